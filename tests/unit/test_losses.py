import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distillation.losses import DistillationLoss, LogitDistillationLoss, TargetStatistics
from distillation.losses.divergence import DivergenceKernel, _TemperedKL
from distillation.losses.target_statistics import token_normalised

ALL = [
    *(("hidden", kind) for kind in DistillationLoss.LOSS_TYPES),
    *(("logit", kind) for kind in LogitDistillationLoss.LOSS_TYPES),
]
NORMALISING = ("nmse", "cosine", "smooth_l1", "whiten")


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_kernel_for_accelerators_is_the_same_divergence(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 5, 7).to(dtype)
    results = []
    for kernel in (None, DivergenceKernel()):
        scores = student.clone().requires_grad_()
        loss = _TemperedKL.apply(scores, teacher, 2.0, kernel)
        (3 * loss).backward()
        assert scores.grad is not None
        results.append((loss.detach(), scores.grad.clone()))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5)


def test_the_cpu_does_without_the_kernel() -> None:
    loss_fn = LogitDistillationLoss()
    loss_fn.kernel.forward = lambda *_: pytest.fail("slower there")  # type: ignore[method-assign]
    scores = torch.randn(2, 5, 7)
    assert loss_fn(scores[0], scores[1]) > 0


def test_mse_and_ce_equal_a_plain_loop() -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    squared = [(a - b) ** 2 for a, b in zip(student.flatten(), teacher.flatten(), strict=True)]
    mean = sum(squared) / len(squared)
    assert DistillationLoss("mse")(student, teacher) == pytest.approx(mean)
    assert LogitDistillationLoss("mse")(student, teacher) == pytest.approx(mean)
    picked = [-s.log_softmax(0)[t.argmax()] for s, t in zip(student, teacher, strict=True)]
    ce = LogitDistillationLoss("ce", 1.0)(student, teacher)
    assert ce == pytest.approx(sum(picked) / len(picked))


@pytest.mark.parametrize(
    ("where", "kind"), [row for row in ALL if row[1] not in ("ce", *NORMALISING)]
)
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
    with pytest.raises(ValueError, match="'mae'; known: cosine, kl_div, mse, nmse, sm"):
        DistillationLoss("mae")
    with pytest.raises(ValueError, match="'mae'; known: ce, kl_div, mse"):
        LogitDistillationLoss("mae")


def levels() -> dict[str, Tensor]:
    """States such as pretrained models have: a growing stream, and giants at some positions."""
    torch.manual_seed(3)
    states = torch.randn(256, 24) @ torch.randn(24, 24) + 2 * torch.randn(24)
    giant = states.clone()
    giant[::64, 5] = 3000.0
    constant = states.clone()
    constant[:, 5] += 3000.0
    return {
        "plain": states,
        "tiny": 1e-3 * states,
        "large": 100 * states,
        "giant": giant,
        "constant": constant,
    }


@pytest.mark.parametrize("kind", NORMALISING)
@pytest.mark.parametrize("level", levels())
def test_the_mean_predictor_has_loss_one_at_every_level(kind: str, level: str) -> None:
    states = levels()[level]
    loss = DistillationLoss(kind, statistics=TargetStatistics.of(states))
    exact = kind != "smooth_l1"  # whose 1 is that of normal states
    value = loss(torch.zeros_like(states), states).item()
    assert value == pytest.approx(1.0, rel=1e-4 if exact else 0.1)


@pytest.mark.parametrize("kind", NORMALISING)
@pytest.mark.parametrize("level", levels())
def test_a_student_that_gives_the_target_has_zero_loss(kind: str, level: str) -> None:
    states = levels()[level]
    loss = DistillationLoss(kind).at_level(TargetStatistics.of(states))
    value = loss(loss.target(states), states).item()
    assert abs(value) < 1e-6 if kind == "cosine" else value == 0.0


@pytest.mark.parametrize("kind", NORMALISING)
@pytest.mark.parametrize("scale", [100.0, 1e-3])
def test_the_scale_of_the_teacher_changes_neither_loss_nor_gradient(
    kind: str, scale: float
) -> None:
    states = levels()["giant"]

    def loss_and_gradient(teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = torch.linspace(-1, 1, 24 * 256).reshape(256, 24).requires_grad_()
        loss = DistillationLoss(kind, statistics=TargetStatistics.of(teacher))(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        return loss, gradient

    for found, expected in zip(
        loss_and_gradient(scale * states), loss_and_gradient(states), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", NORMALISING)
def test_micro_batches_add_up_when_statistics_are_given(kind: str) -> None:
    states, student = levels()["plain"], torch.randn(256, 24)
    loss = DistillationLoss(kind, statistics=TargetStatistics.of(states))
    parts = [(0, 10), (10, 11), (11, 256)]
    total = sum((b - a) / 256 * loss(student[a:b], states[a:b]) for a, b in parts)
    torch.testing.assert_close(total, loss(student, states))


@pytest.mark.parametrize("kind", NORMALISING)
def test_without_statistics_a_batch_is_its_own_level(kind: str) -> None:
    states, student = levels()["large"], torch.randn(256, 24)
    given = DistillationLoss(kind, statistics=TargetStatistics.of(states))
    torch.testing.assert_close(DistillationLoss(kind)(student, states), given(student, states))
    alone = DistillationLoss(kind)(student[:1], states[:1])  # nothing varies: the target is zero
    assert alone.isfinite()


@pytest.mark.parametrize("kind", NORMALISING)
def test_only_the_student_gets_a_gradient_and_it_is_the_derivative(kind: str) -> None:
    teacher = torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    student = torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    loss = DistillationLoss(kind, statistics=TargetStatistics.of(torch.randn(50, 4)))
    value = loss(student, teacher)
    assert value.dtype is torch.float64
    value.backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach()), student)


def test_normalised_losses_equal_their_definitions() -> None:
    states, student = levels()["giant"].double(), torch.randn(256, 24, dtype=torch.float64)
    tokens = torch.stack([(row - row.mean()) / row.std(unbiased=False) for row in states])
    torch.testing.assert_close(token_normalised(states), tokens, rtol=2e-5, atol=1e-6)
    std = tokens.std(0, unbiased=False)
    target = (tokens - tokens.mean(0)) / std.clamp(min=std.quantile(0.05))
    by_hand = {
        "nmse": (student - target).square().sum() / target.square().sum(),
        "cosine": 1 - torch.cosine_similarity(student, target).mean(),
    }
    for kind, expected in by_hand.items():
        found = DistillationLoss(kind)(student, states)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_whitening_flattens_the_variances_half_way_and_keeps_the_channels() -> None:
    states = levels()["plain"]
    loss = DistillationLoss("whiten")
    before = torch.linalg.eigvalsh(TargetStatistics.of(states).covariance)[1:]  # 0: no mean left
    target = loss.target(states)
    after = torch.linalg.eigvalsh(target.T @ target / 256)[1:]
    floor = 1e-3 * before.sum() / 24
    torch.testing.assert_close(after, before * (before + floor) ** -0.5, rtol=1e-3, atol=1e-5)
    tokens = token_normalised(states)
    channels = torch.corrcoef(torch.cat([tokens.T, target.T]))[:24, 24:].diagonal()
    assert channels.min() > 0.5


def test_a_channel_that_hardly_varies_is_not_blown_up() -> None:
    states = torch.randn(500, 40)
    states[:, 7] = 1e-5 * torch.randn(500)
    statistics = TargetStatistics.of(states)
    assert statistics.std.min() > 0.2
    dead = TargetStatistics.of(torch.ones(9, 4) * torch.arange(4.0))
    assert dead.std.min() > 0
    assert dead.standardised(torch.randn(3, 4)).isfinite().all()


def test_cosine_leaves_the_length_free_and_compares_at_the_target_s() -> None:
    states, student = torch.randn(2, 30, 6)
    loss = DistillationLoss("cosine", statistics=TargetStatistics.of(states))
    torch.testing.assert_close(loss(7 * student, states), loss(student, states))
    compared, target = loss.comparable(7 * loss.target(states), states)
    torch.testing.assert_close(compared, target)


def test_other_losses_compare_the_student_as_it_is() -> None:
    states, student = torch.randn(2, 30, 6)
    assert DistillationLoss("mse").comparable(student, states) == (student, states)
    nmse = DistillationLoss("nmse")
    compared, target = nmse.comparable(student, states)
    assert compared is student
    torch.testing.assert_close(target, nmse.target(states))


def test_autocast_does_not_narrow_the_target() -> None:
    states = levels()["plain"]
    for kind in NORMALISING:
        expected = DistillationLoss(kind).target(states)
        with torch.autocast("cpu", torch.bfloat16):
            found = DistillationLoss(kind).target(states)
        torch.testing.assert_close(found, expected)


def test_a_token_of_zeros_stays_one() -> None:
    states = torch.zeros(2, 3, 8)
    assert torch.equal(token_normalised(states), states)


@pytest.mark.parametrize("kind", ["mse", "kl_div"])
def test_losses_on_raw_states_refuse_statistics(kind: str) -> None:
    statistics = TargetStatistics.of(torch.randn(9, 4))
    assert not DistillationLoss(kind).needs_statistics
    with pytest.raises(ValueError, match=f"'{kind}' compares raw states"):
        DistillationLoss(kind, statistics=statistics)
    with pytest.raises(ValueError, match=f"'{kind}' compares raw states"):
        DistillationLoss(kind).at_level(statistics)


@pytest.mark.parametrize("width", [1, 5])
def test_statistics_of_another_width_are_refused(width: int) -> None:
    loss = DistillationLoss("nmse", statistics=TargetStatistics.of(torch.randn(9, width)))
    with pytest.raises(ValueError, match=f"4 wide and the statistics {width}"):
        loss(torch.randn(3, 4), torch.randn(3, 4))


def test_a_level_s_loss_is_a_subclass_s_too_and_leaves_the_first_alone() -> None:
    class Doubled(DistillationLoss):
        def forward(self, student_outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
            return 2 * super().forward(student_outputs, teacher_outputs)

    states, student = torch.randn(2, 20, 4)
    general = Doubled("nmse")
    statistics = TargetStatistics.of(states).to("cpu")
    at_level = general.at_level(statistics)
    assert general.statistics is None
    plain = DistillationLoss("nmse", statistics=statistics)
    torch.testing.assert_close(at_level(student, states), 2 * plain(student, states))
