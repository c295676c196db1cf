"""The teacher's final norm and head behind a stitching layer, as a norm and head of the student.

The stitches of a run are thrown away, but the last one need not be: folded into the head it makes
the student predict what the teacher would after the stitched state. Exact, and no data is read.
"""

import copy
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.errors import UsageError
from cleangpt.heads import head_factors
from distillation.head_init import logit_scale, teacher_head
from stitching_layers import StitchingLayer

_TINY_STATE = 1e-3
"""Root mean square of a state that shows a norm's epsilon, 1e-12 to 1e-3 in practice."""

_SMALLEST_EPSILON = 1e-12


@torch.no_grad()
def fold_head(stitch: StitchingLayer, teacher: BlockStack, student: BlockStack) -> None:
    """Set the student's final norm and head to ``teacher.head(teacher.final_norm(stitch(h)))``.

    With the stitch ``z = P h + c``, the teacher's norm ``g * J z / sqrt(mean((J z)^2) + eps) + b``
    (``J`` subtracts the mean in a LayerNorm and is the identity in an RMS norm) and head ``W_U``,
    the singular values ``J [P c] = U S V^T`` give ``R = S V^T`` with
    ``|R [h; 1]| = |J (P h + c)|``, so that ``logits = W_U diag(g) U f + W_U b`` for the features
    ``f = R [h; 1] / sqrt(|R [h; 1]|^2 / d_T + eps)``. No inverse is formed, so a stitch of any rank
    is folded. Two factors adapt it to a norm over the student's number of features and with the
    student's epsilon.

    Args:
        stitch: The projection from the student's last block to the teacher's.
        teacher: The model whose norm and head are folded.
        student: The model that gets them.

    Raises:
        UsageError: If the student's norm or head cannot hold them, or the teacher's norm is of
            another kind.
    """
    check_foldable(student)
    form = norm_form(teacher.final_norm, teacher.hidden_size)
    norm: Any = student.final_norm
    width = student.hidden_size + 1

    projection = stitch.projection
    constant = torch.zeros(stitch.teacher_dim) if projection.bias is None else projection.bias
    stitched = torch.cat([projection.weight.cpu(), constant.cpu()[:, None]], dim=1).double()
    if form.centres:
        stitched = stitched - stitched.mean(0)
    u, s, vt = torch.linalg.svd(stitched, full_matrices=False)
    rank = len(s)

    unit = sqrt(width / teacher.hidden_size)
    norm.weight.zero_()
    norm.weight[:rank] = (unit * sqrt(norm.eps / form.epsilon) * s[:, None] * vt).to(norm.weight)
    scale = logit_scale(teacher, _ordinary_states(teacher))
    unembedding, offset = teacher_head(teacher, scale, student)
    head, rows = student.lm_head, len(unembedding)
    head.weight[:rows] = 0.0
    head.weight[:rows, :rank] = (unembedding * form.gain @ u / unit).to(head.weight)
    head.bias[:rows] = (offset + unembedding @ form.bias).to(head.bias)


def check_foldable(student: BlockStack) -> None:
    """Refuse a student whose final norm and head cannot hold the teacher's.

    Raises:
        UsageError: If the norm is not the folded one, or the head is not one full matrix.
    """
    if getattr(student.model.config, "final_norm", None) != "folded":
        raise UsageError(
            "head_start='fold' needs a student whose final norm can hold the teacher's, and this"
            f" one has a {type(student.final_norm).__name__}.",
            "Build the student with final_norm='folded', or choose head_start='least_squares'.",
        )
    if head_factors(student.lm_head) is not None:
        raise UsageError(
            "head_start='fold' is exact, and the student's head is of low rank.",
            "Leave head_rank out, or choose head_start='least_squares'.",
        )


@dataclass(frozen=True)
class NormForm:
    """A norm ``gain * J x / sqrt(mean((J x)^2) + epsilon) + bias``.

    Attributes:
        gain: One factor per channel.
        bias: One summand per channel.
        epsilon: Added to the mean square, > 0.
        centres: Whether ``J`` subtracts the mean over channels, or does nothing.
    """

    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    epsilon: float
    centres: bool

    def __call__(self, states: Float[Tensor, "positions d"]) -> Float[Tensor, "positions d"]:
        """Apply the norm."""
        if self.centres:
            states = states - states.mean(-1, keepdim=True)
        mean_square = states.square().mean(-1, keepdim=True)
        return self.gain * states / (mean_square + self.epsilon).sqrt() + self.bias


@torch.no_grad()
def norm_form(norm: nn.Module, width: int) -> NormForm:
    """Find a norm's gain, bias and epsilon by running it: families name and store them differently.

    Args:
        norm: A LayerNorm or RMS norm of any family.
        width: Channels it works on.

    Raises:
        UsageError: If it computes anything else.
    """
    exact = copy.deepcopy(norm).cpu().double()
    bias = exact(torch.zeros(1, width, dtype=torch.float64))[0]
    centres = bool((exact(torch.ones(1, width, dtype=torch.float64))[0] - bias).abs().max() < 1e-6)
    signs = torch.arange(width, dtype=torch.float64) % 2 * 2 - 1
    signs = signs - signs.mean()
    state = (signs / signs.square().mean().sqrt())[None]  # mean 0, mean square 1
    ordinary, tiny = exact(state)[0] - bias, exact(_TINY_STATE * state)[0] - bias
    # tiny / ordinary = t sqrt(1 + eps) / sqrt(t^2 + eps), solved for eps.
    ratio = float(tiny.norm() / ordinary.norm()) ** 2
    excess = max(ratio - _TINY_STATE**2, _SMALLEST_EPSILON)  # 0 for a map that is no norm
    epsilon = max(_TINY_STATE**2 * (1 - ratio) / excess, _SMALLEST_EPSILON)
    form = NormForm(ordinary * sqrt(1 + epsilon) / state[0], bias, epsilon, centres)
    probe = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).double() + 1.0
    probe *= torch.tensor([[0.01], [1.0], [100.0], [10_000.0]])
    if not torch.allclose(form(probe), exact(probe), rtol=1e-4, atol=1e-5):
        raise UsageError(
            f"The teacher's final norm, a {type(norm).__name__}, is neither a LayerNorm nor an RMS"
            " norm, so it cannot be folded.",
            "Choose head_start='least_squares'.",
        )
    return form


def _ordinary_states(teacher: BlockStack) -> Tensor:
    """Last states of a few tokens, to see what the teacher does to its logits."""
    length = min(16, teacher.context_length or 16)
    ids = torch.arange(length, device=teacher.device)[None] % teacher.vocab_size
    return teacher.state_entering(teacher.num_blocks, ids)[0]
