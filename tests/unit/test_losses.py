import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distillation.losses import DistillationLoss, LogitDistillationLoss

ALL = [
    *(("hidden", kind) for kind in DistillationLoss.LOSS_TYPES),
    *(("logit", kind) for kind in LogitDistillationLoss.LOSS_TYPES),
]


def make(where: str, kind: str, temperature: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    cls = DistillationLoss if where == "hidden" else LogitDistillationLoss
    return cls(kind, temperature)


def kl_by_loop(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """KL(teacher || student) times temperature squared, position by position, class by class."""
    total = 0.0
    for s, t in zip(
        (student / temperature).tolist(), (teacher / temperature).tolist(), strict=True
    ):
        norm_s, norm_t = sum(map(math.exp, s)), sum(map(math.exp, t))
        for a, b in zip(s, t, strict=True):
            p = math.exp(b) / norm_t
            total += p * (math.log(p) - math.log(math.exp(a) / norm_s))
    return total / len(student) * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("where", "kind"), [("hidden", "kl_div"), ("logit", "kl_div")])
def test_kl_equals_a_plain_loop(where: str, kind: str, temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    loss = make(where, kind, temperature)(student, teacher)
    assert loss.item() == pytest.approx(kl_by_loop(student, teacher, temperature), rel=1e-9)


def test_mse_and_ce_equal_a_plain_loop() -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    squared = [(a - b) ** 2 for a, b in zip(student.flatten(), teacher.flatten(), strict=True)]
    mean = sum(squared) / len(squared)
    assert DistillationLoss("mse")(student, teacher) == pytest.approx(mean)
    assert LogitDistillationLoss("mse")(student, teacher) == pytest.approx(mean)
    picked = [-s.log_softmax(0)[t.argmax()] for s, t in zip(student, teacher, strict=True)]
    ce = LogitDistillationLoss("ce", 1.0)(student, teacher)
    assert ce == pytest.approx(sum(picked) / len(picked))


@pytest.mark.parametrize(("where", "kind"), [row for row in ALL if row[1] != "ce"])
def test_a_perfect_student_has_zero_loss(where: str, kind: str) -> None:
    states = torch.randn(9, 11)
    assert make(where, kind, 3.0)(states, states).item() == 0.0


@pytest.mark.parametrize(("where", "kind"), ALL)
def test_length_and_batch_split_do_not_change_the_mean(where: str, kind: str) -> None:
    """P3: a mean over positions is the same for [2, 6, d] and [12, d]."""
    student, teacher = torch.randn(2, 2, 6, 5)
    loss = make(where, kind, 2.0)
    flat = loss(student.reshape(12, 5), teacher.reshape(12, 5))
    torch.testing.assert_close(loss(student, teacher), flat)


@pytest.mark.parametrize(("where", "kind"), ALL)
def test_unequal_shapes_are_refused_even_if_they_broadcast(where: str, kind: str) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(2, 3, 1\).*stitching"):
        make(where, kind)(torch.randn(2, 3, 4), torch.randn(2, 3, 1))


@pytest.mark.parametrize(("where", "kind"), ALL)
def test_half_precision_is_widened(where: str, kind: str) -> None:
    student, teacher = torch.randn(2, 6, 5).bfloat16()
    loss = make(where, kind, 2.0)(student, teacher)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, make(where, kind, 2.0)(student.float(), teacher.float()))


def test_temperature_squared_keeps_the_gradient_size() -> None:
    teacher = torch.randn(64, 20)

    def gradient(temperature: float) -> float:
        student = torch.zeros(64, 20, requires_grad=True)
        LogitDistillationLoss("kl_div", temperature)(student, teacher).backward()
        assert student.grad is not None
        return student.grad.norm().item()

    assert gradient(50.0) == pytest.approx(gradient(100.0), rel=0.02)


@pytest.mark.parametrize("cls", [DistillationLoss, LogitDistillationLoss])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_impossible_temperatures_are_refused(cls: type, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        cls(temperature=temperature)


def test_unknown_losses_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'mae'; known: kl_div, mse"):
        DistillationLoss("mae")
    with pytest.raises(ValueError, match="'mae'; known: ce, kl_div, mse"):
        LogitDistillationLoss("mae")
