"""The chunked loss on logits: equal to the dense one in value and gradient, and small in memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distillation.losses import LogitDistillationLoss
from distillation.losses.chunked import chunked_linear_loss, linear_logits

POSITIONS, WIDTH, TEACHER_WIDTH, VOCAB = 37, 8, 12, 5003


def parts(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((POSITIONS, WIDTH), (VOCAB, WIDTH), (VOCAB,), (POSITIONS, TEACHER_WIDTH))
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    head = torch.randn((VOCAB, TEACHER_WIDTH), generator=generator, dtype=dtype)
    return (*[tensor.requires_grad_() for tensor in made[:3]], made[3], head)


def chunked(
    loss_fn: Callable[[Tensor, Tensor], Tensor], chunk: int | None, bias: bool, seed: int = 0
) -> tuple[Tensor, ...]:
    features, weight, offset, teacher, head = parts(seed)
    offset_or_none = offset if bias else None
    loss = chunked_linear_loss(
        loss_fn,
        features,
        weight,
        offset_or_none,
        lambda rows: linear_logits(teacher[rows], head, None),
        chunk=chunk,
    )
    (0.7 * loss).backward()
    gradients = [features.grad, weight.grad, offset.grad]
    return (loss.detach(), *[g for g in gradients if g is not None])


def dense(
    loss_fn: Callable[[Tensor, Tensor], Tensor], bias: bool, seed: int = 0
) -> tuple[Tensor, ...]:
    features, weight, offset, teacher, head = parts(seed)
    logits = features @ weight.T + (offset if bias else 0.0)
    loss = loss_fn(logits, teacher @ head.T)
    (0.7 * loss).backward()
    gradients = [features.grad, weight.grad, offset.grad]
    return (loss.detach(), *[g for g in gradients if g is not None])


def own_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1).sqrt().mean()


LOSSES = [
    *(LogitDistillationLoss(kind, 2.0) for kind in LogitDistillationLoss.LOSS_TYPES),
    own_loss,
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 10, 37, 100, None])
@pytest.mark.parametrize("loss_fn", LOSSES, ids=["kl_div", "mse", "ce", "own"])
def test_loss_and_gradients_equal_the_dense_ones(
    loss_fn: Callable[[Tensor, Tensor], Tensor], chunk: int | None, bias: bool
) -> None:
    for ours, expected in zip(chunked(loss_fn, chunk, bias), dense(loss_fn, bias), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_a_frozen_head_gets_no_gradient() -> None:
    features, weight, _, teacher, head = parts()
    weight.requires_grad_(False)
    loss = chunked_linear_loss(
        LogitDistillationLoss(), features, weight, None, lambda rows: teacher[rows] @ head.T
    )
    loss.backward()
    assert features.grad is not None
    assert weight.grad is None


def test_under_autocast_sums_stay_float32() -> None:
    features, weight, _, teacher, head = parts()
    half = (teacher.bfloat16(), head.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_linear_loss(
            LogitDistillationLoss(),
            features,
            weight,
            None,
            lambda rows: linear_logits(half[0][rows], half[1], None),
            chunk=10,
        )
    loss.backward()
    assert loss.dtype == torch.float32
    exact = dense(LogitDistillationLoss(), bias=False)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(exact[0].item(), rel=0.02)
    cosine = torch.cosine_similarity(weight.grad.flatten(), exact[2].flatten(), dim=0)
    assert cosine > 0.999


def test_memory_does_not_grow_with_positions() -> None:
    def largest_tensor(positions: int) -> int:
        seen: list[int] = []

        def spy(student: Tensor, teacher: Tensor) -> Tensor:
            seen.append(max(student.numel(), teacher.numel()))
            return ((student - teacher) ** 2).mean()

        features = torch.randn(positions, WIDTH, requires_grad=True)
        weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
        chunked_linear_loss(
            spy, features, weight, None, lambda rows: torch.zeros(len(features[rows]), VOCAB)
        )
        return max(seen)

    assert max(largest_tensor(n) for n in (10_000, 20_000)) <= 10_500_000
