import torch
from hypothesis import given, settings, strategies as st

from distillation.losses import LogitDistillationLoss

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
