"""The student's head before its training: untied, and started from the teacher's.

With equal widths and no stitch between them, the teacher's final norm and head are copied.
Otherwise the head is the least-squares answer to: which head on the student's final features gives
the teacher's logits? Nothing is ever projected by random numbers.
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.heads import head_is_linear, logits_at
from distillation.activations import Activations
from distillation.batch import Batch

logger = logging.getLogger(__name__)

RIDGE = 1e-4
"""Ridge term of the regression, as a share of the mean feature energy: hardly any bias."""

_POSITIONS_FOR_SCALE = 64

BIAS_RIDGE = 1e-3
"""The same for the intercept's solve. A LayerNorm's features sum to zero, so the head is nearly
blind to one direction; without a firm ridge the norm's bias grows along it, and with it the
gradient of the head, while the logits gain nothing."""


def untie_lm_head(stack: BlockStack) -> bool:
    """Give the head a weight of its own if it shares the embedding's; return whether it did.

    A head tied to embeddings that feed frozen blocks must never be trained: it would move their
    inputs.
    """
    model = stack.model
    head = stack.lm_head
    if head.weight is not model.get_input_embeddings().weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    # transformers fixes the list of tied names when a model is built, and saves by it.
    model.all_tied_weights_keys = {}
    return True


def can_copy_head(teacher: BlockStack, student: BlockStack, *, stitched: bool) -> bool:
    """Whether the teacher's final norm and head fit the student's hidden states as they are."""
    same_norm = _shapes(teacher.final_norm) == _shapes(student.final_norm)
    same_kind = type(teacher.final_norm) is type(student.final_norm)
    same_head = _shapes(teacher.lm_head) == _shapes(student.lm_head)
    return not stitched and same_norm and same_kind and same_head


@torch.no_grad()
def copy_head(teacher: BlockStack, student: BlockStack) -> None:
    """Copy the teacher's final norm and head into the student."""
    student.final_norm.load_state_dict(teacher.final_norm.state_dict())
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())


@torch.no_grad()
def fit_head(activations: Activations, batches: Iterable[Batch], max_tokens: int) -> None:
    """Set the student's head, and its final norm's bias, by least squares.

    With ``f_T`` the teacher's final features, ``f_S`` the student's, ``W_U`` and ``b_U`` the
    teacher's head, and ``B, c`` the ridge regression ``f_T ~ B f_S + c``, the minimiser of
    ``E ||W_U f_T - W f_S||^2`` is ``W = W_U B``: sums over the vocabulary are never needed. The
    intercept moves into the norm's bias as the ``d`` that minimises the error of
    ``W (f_S + d) = W f_S + W_U c + b_U``, up to a constant per position, which softmax ignores.

    Args:
        activations: Where final states come from.
        batches: Data to fit on.
        max_tokens: Stop after this many valid positions.
    """
    sums = FeatureSums()
    scale = None
    teacher, student = activations.teacher, activations.student
    for batch in batches:
        raw = activations.teacher_output(teacher.num_blocks - 1, batch)
        teacher_features = batch.valid(teacher.final_norm(raw))
        student_state = activations.student_input(student.num_blocks, batch)
        sums.add(batch.valid(student.head_features(student_state)), teacher_features)
        if scale is None:
            scale = _logit_scale(teacher, batch.valid(raw), teacher_features)
        if sums.count >= max_tokens:
            break
    _set_head(student, teacher.lm_head, *sums.regression(), scale or 1.0)


class FeatureSums:
    """Streaming sums of the regression of teacher features on student features, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._xx: Tensor | None = None
        self._xy: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count positions: x of shape [positions, d_student], y of shape [positions, d_teacher]."""
        x, y = x.cpu().double(), y.cpu().double()  # not every accelerator has float64
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        xx, xy = x.T @ x, x.T @ y
        self._xx = xx if self._xx is None else self._xx + xx
        self._xy = xy if self._xy is None else self._xy + xy
        self.count += x.shape[0]

    def regression(self) -> tuple[Tensor, Tensor]:
        """Return ``B`` of shape [d_teacher, d_student] and ``c`` of shape [d_teacher].

        Raises:
            ValueError: If no position was counted.
        """
        if self._xx is None or self._xy is None:
            raise ValueError("No valid position to fit the head on.")
        ridge = torch.eye(self._xx.shape[0], dtype=torch.float64, device=self._xx.device)
        ridge[-1, -1] = 0.0  # the intercept is not shrunk
        energy = self._xx.diagonal()[:-1].mean()
        solution = torch.linalg.solve(self._xx + RIDGE * energy * ridge, self._xy).T
        return solution[:, :-1], solution[:, -1]


def _logit_scale(teacher: BlockStack, state: Tensor, features: Tensor) -> float:
    """What the teacher multiplies its head's output by: 1, or as some positions show."""
    if head_is_linear(teacher):
        return 1.0
    few = slice(0, _POSITIONS_FOR_SCALE)
    output = teacher.lm_head(features[few]).cpu().double()
    logits = logits_at(teacher, state[few]).cpu().double()
    return float((output * logits).sum() / output.square().sum())


def _set_head(
    student: BlockStack, teacher_head: nn.Linear, b: Tensor, c: Tensor, scale: float
) -> None:
    unembedding = scale * teacher_head.weight.cpu().double()
    rows = min(student.vocab_size, unembedding.shape[0])
    weight = (unembedding @ b)[:rows]
    student.lm_head.weight[:rows] = weight.to(student.lm_head.weight)
    offset = unembedding @ c
    if teacher_head.bias is not None:
        offset = offset + scale * teacher_head.bias.cpu().double()
    norm_bias = getattr(student.final_norm, "bias", None)
    if norm_bias is None:
        logger.warning(
            "The student's final norm has no bias, so the head starts without intercept."
        )
        return
    centred = weight - weight.mean(0)
    centred_offset = offset[:rows] - offset[:rows].mean()
    gram = centred.T @ centred
    gram += (
        BIAS_RIDGE
        * gram.diagonal().mean()
        * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    )
    norm_bias += torch.linalg.solve(gram, centred.T @ centred_offset).to(norm_bias)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}
