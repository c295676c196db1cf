"""The student's head before its training: untied, and started from the teacher's.

With equal widths and no stitch between them, the teacher's final norm and head are copied.
Otherwise the head is the least-squares answer to: which head on the student's final features gives
the teacher's logits? Nothing is ever projected by random numbers. ``head_fold.py`` has the start
that asks no data.
"""

import logging
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.heads import head_factors, head_is_linear, head_is_tied, logits_at
from distillation.activations import Activations
from distillation.batch import Batch
from distillation.least_squares import LeastSquares

logger = logging.getLogger(__name__)

_POSITIONS_FOR_SCALE = 64

BIAS_RIDGE = 1e-3
"""Ridge of the intercept's solve, as a share of the mean diagonal. A LayerNorm's features sum to
zero, so the head is nearly blind to one direction; without a firm ridge the norm's bias grows along
it, and with it the gradient of the head, while the logits gain nothing."""

NORM_RIDGE = 1e-4
"""Ridge of a tied head's norm, as a share of the diagonal: towards the norm as it is."""

METRIC_RIDGE = 1e-6
"""What the features' second moment gets, as a share of its mean diagonal, to have an inverse."""


def untie_lm_head(stack: BlockStack) -> bool:
    """Give the head a weight of its own if it shares the embedding's; return whether it did.

    A head tied to embeddings that feed frozen blocks must never be trained: it would move their
    inputs.
    """
    if not head_is_tied(stack):
        return False
    model, head = stack.model, stack.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    # transformers fixes the list of tied names when a model is built, and saves by it.
    model.all_tied_weights_keys = {}
    return True


def tie_lm_head(stack: BlockStack) -> None:
    """Make the head the embeddings again, for a run that goes on from before it was untied.

    Only a student that stayed in memory, as in a notebook, can have come further than its run's
    last checkpoint.
    """
    if head_is_tied(stack):
        return
    model = stack.model
    stack.lm_head.weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def can_copy_head(teacher: BlockStack, student: BlockStack, *, stitched: bool) -> bool:
    """Whether the teacher's final norm and head fit the student's hidden states as they are.

    The number of rows does not matter: those that both have stand for the same tokens.
    """
    same_norm = _shapes(teacher.final_norm) == _shapes(student.final_norm)
    same_kind = type(teacher.final_norm) is type(student.final_norm)
    heads = [_shapes(stack.lm_head) for stack in (teacher, student)]
    theirs, own = ({name: shape[1:] for name, shape in shapes.items()} for shapes in heads)
    return not stitched and same_norm and same_kind and theirs == own


@torch.no_grad()
def copy_head(teacher: BlockStack, student: BlockStack) -> None:
    """Copy the teacher's final norm and head into the student, its padded rows left out."""
    student.final_norm.load_state_dict(teacher.final_norm.state_dict())
    rows = min(teacher.vocab_size, student.vocab_size)
    theirs = dict(teacher.lm_head.named_parameters())
    for name, own in student.lm_head.named_parameters():
        own[:rows] = theirs[name][:rows]


@torch.no_grad()
def fit_head(activations: Activations, batches: Iterable[Batch], max_tokens: int) -> None:
    """Set the student's head, and its final norm's bias, by least squares.

    With ``f_T`` the teacher's final features, ``f_S`` the student's, ``W_U`` and ``b_U`` the
    teacher's head, and ``B, c`` the ridge regression ``f_T ~ B f_S + c``, the minimiser of
    ``E ||W_U f_T - W f_S||^2`` is ``W = W_U B``: sums over the vocabulary are never needed. The
    intercept ``W_U c + b_U`` is the head's bias. A head without one has it in the norm's bias, as
    the ``d`` that minimises the error of ``W (f_S + d) = W f_S + W_U c + b_U``, up to a constant
    per position, which softmax ignores. A head of low rank gets the nearest product in the metric
    of the features, and a tied head only a norm with gain and bias.

    Args:
        activations: Where final states come from.
        batches: Data to fit on.
        max_tokens: Stop after this many valid positions.
    """
    sums = LeastSquares()
    scale = None
    teacher, student = activations.teacher, activations.student
    norm = student.final_norm
    has_bias = isinstance(norm, nn.LayerNorm) and norm.bias is not None
    if head_is_tied(student) and not has_bias:
        logger.warning(
            "The head is the embedding matrix, and the final norm, a %s, starts as it is.",
            type(norm).__name__,
        )
        return  # before a model has read anything
    for batch in batches:
        raw = activations.teacher_output(teacher.num_blocks - 1, batch)
        teacher_features = batch.valid(teacher.final_norm(raw))
        student_state = activations.student_input(student.num_blocks, batch)
        sums.add(batch.valid(student.head_features(student_state)), teacher_features)
        if scale is None:
            scale = logit_scale(teacher, batch.valid(raw))
        if sums.count >= max_tokens:
            break
    unembedding, offset = teacher_head(teacher, 1.0 if scale is None else scale, student)
    b, c = sums.regression()
    weight, offset = unembedding @ b, offset + unembedding @ c
    if head_is_tied(student):
        _fit_norm(student, weight, offset, sums)
    else:
        _set_head(student, weight, offset, sums)
        logger.info("The head starts as the least-squares fit of the teacher's logits.")


def teacher_head(
    teacher: BlockStack, scale: float, student: BlockStack
) -> tuple[Float[Tensor, "vocab d_teacher"], Float[Tensor, " vocab"]]:
    """The teacher's head and its bias times ``scale``, for the rows the student has, in float64."""
    rows = min(student.vocab_size, teacher.vocab_size)
    weight = scale * teacher.lm_head.weight[:rows].cpu().double()
    if teacher.lm_head.bias is None:
        return weight, torch.zeros_like(weight[:, 0])
    return weight, scale * teacher.lm_head.bias[:rows].cpu().double()


def logit_scale(teacher: BlockStack, states: Float[Tensor, "positions d_teacher"]) -> float:
    """What the teacher multiplies its head's output by: 1, or as its last block's states show."""
    if head_is_linear(teacher):
        return 1.0
    few = states[:_POSITIONS_FOR_SCALE]
    output = teacher.lm_head(teacher.final_norm(few)).cpu().double()
    logits = logits_at(teacher, few).cpu().double()
    return float((output * logits).sum() / output.square().sum())


def _set_head(student: BlockStack, weight: Tensor, offset: Tensor, sums: LeastSquares) -> None:
    """Write a head on the student's features, [rows, d_student], and its intercept, [rows]."""
    head, rows = student.lm_head, len(weight)
    factors = head_factors(head)
    if factors is None:
        head.weight[:rows] = weight.to(head.weight)
    else:
        _, second_moment = sums.input_moments()
        down, up = best_factors(weight, second_moment, len(factors[0].weight))
        factors[0].weight.copy_(down)
        factors[1].weight[:rows] = up.to(factors[1].weight)
        weight = up @ down
    norm_bias = getattr(student.final_norm, "bias", None)
    if head.bias is not None:
        head.bias[:rows] = offset.to(head.bias)
    elif norm_bias is not None:
        norm_bias += _through_head(weight, offset).to(norm_bias)
    else:
        logger.warning(
            "The student's final norm has no bias, so the head starts without intercept."
        )


def best_factors(
    weight: Float[Tensor, "vocab d"], second_moment: Float[Tensor, "d d"], rank: int
) -> tuple[Float[Tensor, "rank d"], Float[Tensor, "vocab rank"]]:
    """Return ``D, U`` of this rank that minimise ``E ||W f - U D f||^2``, given ``E[f f^T]``.

    With ``C`` the second moment, ``U D = [W C^1/2]_rank C^-1/2`` where ``[.]_rank`` is the best
    approximation in the Frobenius norm (Eckart & Young 1936). ``D f`` has unit second moments.
    """
    ridge = METRIC_RIDGE * second_moment.diagonal().mean()
    energies, directions = torch.linalg.eigh(second_moment)
    spread = (energies.clamp(min=0) + ridge).sqrt()
    root, inverse_root = directions * spread, directions / spread
    # The right singular vectors of W C^1/2, without a decomposition of vocabulary size.
    _, vectors = torch.linalg.eigh(root.T @ (weight.T @ weight) @ root)
    leading = vectors[:, -rank:]
    return (inverse_root @ leading).T, weight @ (root @ leading)


def _through_head(weight: Tensor, offset: Tensor) -> Tensor:
    """The ``d`` whose image ``W d`` is nearest to ``offset``, up to a constant over tokens."""
    centred = weight - weight.mean(0)
    gram = centred.T @ centred
    gram.diagonal().add_(BIAS_RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, centred.T @ (offset - offset.mean()))


def _fit_norm(student: BlockStack, weight: Tensor, offset: Tensor, sums: LeastSquares) -> None:
    """Fit the final norm of a head that must stay the embedding matrix ``E``.

    Norm features become ``a * f + e`` with the ``a`` and ``e`` that minimise
    ``E ||E (a * f + e) - W f - offset||^2``, up to a constant per position. A quadratic of two
    vectors, whose moments are those of ``f``.
    """
    norm = student.final_norm
    assert isinstance(norm, nn.LayerNorm)
    embeddings = student.lm_head.weight[: len(weight)].cpu().double()
    embeddings = embeddings - embeddings.mean(0)
    gram, wanted = embeddings.T @ embeddings, embeddings.T @ weight
    mean, second_moment = sums.input_moments()
    constant = embeddings.T @ offset
    both = torch.cat(
        [
            torch.cat([gram * second_moment, mean[:, None] * gram], dim=1),
            torch.cat([gram * mean, gram], dim=1),
        ]
    )
    target = torch.cat(
        [(wanted @ second_moment).diagonal() + constant * mean, wanted @ mean + constant]
    )
    start = torch.cat([torch.ones_like(mean), torch.zeros_like(mean)])
    ridge = torch.diag(NORM_RIDGE * both.diagonal())
    gain, shift = (start + torch.linalg.solve(both + ridge, target - both @ start)).chunk(2)
    norm.weight.mul_(gain.to(norm.weight))
    norm.bias.mul_(gain.to(norm.bias)).add_(shift.to(norm.bias))
    logger.info("The final norm starts as the least-squares fit of the teacher's logits.")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}
