"""A loss on the logits of a linear head, without the logits of a whole batch in memory.

Loss and gradients are formed together, some positions at a time, so the memory for logits does not
grow with batch times length. The logits of a chunk are computed in tiles of the vocabulary where
the processor is faster that way.

The idea is that of fused linear cross-entropy (Hsu et al. 2024, Liger Kernel, arXiv:2410.10989,
section 3.2; Wijmans et al. 2024, arXiv:2411.09009), here for any loss that is a mean over
positions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 10_500_000
"""Logits per chunk and model: 208 positions of GPT-2's vocabulary keep products efficient."""

_VOCABULARY_TILE = 512
"""MKL's float32 product of 256 positions with 50,257 rows: at once 117 GFLOP/s, in tiles 177."""

_ROWS_ADDED_AT_ONCE = 8192

Logits = Callable[[slice], Tensor]
"""From a range of positions to their logits, [positions, vocab]."""


def chunked_linear_loss(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    features: Float[Tensor, "positions d_student"],
    weight: Float[Tensor, "vocab d_student"],
    bias: Float[Tensor, " vocab"] | None,
    teacher_logits: Logits,
    *,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Return ``loss_fn(features @ weight.T + bias, teacher_logits(all))``, with its graph.

    Under autocast the products run in its dtype; sums over chunks are float32.

    Args:
        loss_fn: ``(student, teacher) -> mean over positions``.
        features: What the student's head reads.
        weight: The student's head.
        bias: Its bias, or None.
        teacher_logits: The teacher's logits of a range of positions; they get no gradient.
        chunk: Positions at once; None follows :data:`LOGITS_AT_ONCE`.
    """
    if chunk is None:
        most = max(64, LOGITS_AT_ONCE // len(weight))
        parts = math.ceil(len(features) / most)
        chunk = math.ceil(len(features) / max(1, parts))  # a small last part would be slow
    mean: Tensor = _ChunkedLinearLoss.apply(
        features, weight, bias, loss_fn, teacher_logits, max(1, chunk)
    )
    return mean


def linear_logits(
    features: Float[Tensor, "positions d"],
    weight: Float[Tensor, "vocab d"],
    bias: Float[Tensor, " vocab"] | None,
    out: Tensor | None = None,
) -> Float[Tensor, "positions vocab"]:
    """``features @ weight.T + bias`` of tensors of one dtype, into ``out`` if it is given."""
    logits = features.new_empty(len(features), len(weight)) if out is None else out[: len(features)]
    tiled = features.device.type == "cpu" and features.dtype == torch.float32
    step = _VOCABULARY_TILE if tiled else len(weight)
    for start in range(0, len(weight), step):
        tile = slice(start, start + step)
        torch.mm(features, weight[tile].T, out=logits[:, tile])
    return logits if bias is None else logits.add_(bias)


def linear_head(
    features: Float[Tensor, "positions d"],
    weight: Float[Tensor, "vocab d"],
    bias: Float[Tensor, " vocab"] | None,
) -> Logits:
    """The logits of a frozen linear head, by ranges of positions, in one memory.

    A range's logits are overwritten by the next one's.
    """
    device = features.device.type
    dtype = product_dtype(features)
    low: list[Any] = [None if t is None else t.to(dtype) for t in (features, weight, bias)]
    memory: list[Tensor] = []

    @torch.no_grad()
    def logits(rows: slice) -> Tensor:
        part, head, offset = low
        part = part[rows]
        if not memory or len(memory[0]) < len(part):
            memory[:] = [part.new_empty(len(part), len(head))]
        with torch.autocast(device, enabled=False):
            return linear_logits(part, head, offset, memory[0])

    return logits


def checkpointed_loss(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    student_logits: Logits,
    teacher_logits: Logits,
    positions: int,
    *,
    chunk: int = 1024,
) -> Float[Tensor, ""]:
    """The same for a head of any kind: each chunk's logits are computed again in the backward pass.

    A third slower than :func:`chunked_linear_loss`, and as flat in memory.
    """

    def part(rows: slice) -> Tensor:
        return loss_fn(student_logits(rows), teacher_logits(rows))

    total: Any = 0.0
    for start in range(0, positions, chunk):
        rows = slice(start, min(start + chunk, positions))
        mean = checkpoint(part, rows, use_reentrant=False, preserve_rng_state=False)
        total = total + mean * ((rows.stop - start) / positions)
    return torch.as_tensor(total)


def product_dtype(features: Tensor) -> torch.dtype:
    """The dtype in which matrix products of ``features`` run now."""
    device = features.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return features.dtype


class _ChunkedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        teacher_logits: Logits,
        size: int,
    ) -> Tensor:
        device = features.device.type
        dtype = product_dtype(features)
        needs = ctx.needs_input_grad[:3]
        gradients = [
            torch.zeros_like(given, dtype=torch.promote_types(given.dtype, torch.float32))
            if needed and given is not None
            else None
            for given, needed in zip((features, weight, bias), needs, strict=True)
        ]
        with torch.autocast(device, enabled=False):
            low = [None if t is None else t.detach().to(dtype) for t in (features, weight, bias)]
            mean = _add_up(low, gradients, loss_fn, teacher_logits, size)
        ctx.gradients = gradients
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(outer.to(g.dtype)) for g in gradients]
        return (*scaled, None, None, None)


def _add_up(
    head: list[Any],
    gradients: list[Tensor | None],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    teacher_logits: Logits,
    size: int,
) -> Tensor:
    """Sum loss and gradients over chunks; each mean weighs as its share of all positions."""
    features, weight, bias = head
    for_features, for_weight, for_bias = gradients
    count = len(features)
    total = features.new_zeros((), dtype=torch.promote_types(features.dtype, torch.float32))
    buffer = features.new_empty(min(size, count), len(weight))
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        share = (rows.stop - start) / count
        student = linear_logits(features[rows], weight, bias, buffer).detach()
        student.requires_grad_(any(g is not None for g in gradients))
        with torch.enable_grad():
            loss = loss_fn(student, teacher_logits(rows))
        total += loss.detach() * share
        if not student.requires_grad:
            continue
        (error,) = torch.autograd.grad(loss, student)
        if for_features is not None:
            for_features[rows] = error @ weight * share
        if for_weight is not None:
            _add_product(for_weight, error, features[rows] * share)
        if for_bias is not None:
            for_bias += error.sum(0, dtype=for_bias.dtype) * share
    return total


def _add_product(total: Tensor, error: Tensor, features: Tensor) -> None:
    """``total += error.T @ features``; of a lower dtype in parts, so that their sum stays small."""
    if total.dtype == error.dtype:
        total.addmm_(error.T, features)
        return
    for start in range(0, len(total), _ROWS_ADDED_AT_ONCE):
        rows = slice(start, start + _ROWS_ADDED_AT_ONCE)
        total[rows] += error[:, rows].T @ features
