import torch
from hypothesis import given, settings, strategies as st

from distillation.losses import DistillationLoss, LogitDistillationLoss, TargetStatistics

SETTINGS = settings(max_examples=25, deadline=None)


@SETTINGS
@given(
    positions=st.integers(1, 6),
    vocab=st.integers(2, 9),
    temperature=st.floats(0.25, 8),
    shift=st.floats(-5, 5),
    seed=st.integers(0, 999),
)
def test_divergence_properties(
    positions: int, vocab: int, temperature: float, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, positions, vocab, generator=generator, dtype=torch.float64)
    loss = LogitDistillationLoss("kl_div", temperature)
    value = loss(student, teacher)
    assert value >= 0
    # Softmax ignores a constant per position, and a mean the order of positions.
    torch.testing.assert_close(loss(student + shift, teacher - shift), value)
    order = torch.randperm(positions, generator=generator)
    torch.testing.assert_close(loss(student[order], teacher[order]), value)


@SETTINGS
@given(
    kind=st.sampled_from(["nmse", "cosine", "smooth_l1", "whiten"]),
    positions=st.integers(2, 20),
    cut=st.integers(1, 19),
    dim=st.integers(2, 9),
    scale=st.floats(1e-4, 1e4),
    giant=st.floats(1, 1e4),
    seed=st.integers(0, 999),
)
def test_losses_that_normalise(
    kind: str, positions: int, cut: int, dim: int, scale: float, giant: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, positions, dim, generator=generator, dtype=torch.float64)
    teacher[0, 0] *= giant
    statistics = TargetStatistics.of(torch.cat([teacher, teacher.flip(-1)]))
    loss = DistillationLoss(kind, statistics=statistics)
    value = loss(student, teacher)
    assert value >= 0
    # Only directions of the teacher's states count, and any cut into batches gives the same mean.
    torch.testing.assert_close(loss(student, scale * teacher), value)
    cut = min(cut, positions - 1)
    first, rest = loss(student[:cut], teacher[:cut]), loss(student[cut:], teacher[cut:])
    torch.testing.assert_close((cut * first + (positions - cut) * rest) / positions, value)
