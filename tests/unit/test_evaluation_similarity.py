"""Linear CKA of blocks: bounds, invariances, and a plain computation of the same figure."""

from typing import Any

import pytest

from tests.evaluation_samples import VOCAB, student, teacher


def hsic(first: Any, second: Any) -> float:
    """The unbiased estimate as Song et al. write it."""
    import torch

    one, other = first.clone().fill_diagonal_(0), second.clone().fill_diagonal_(0)
    count = len(one)
    ones = torch.ones(count, dtype=torch.float64)
    total = (one @ other).trace()
    total += (ones @ one @ ones) * (ones @ other @ ones) / ((count - 1) * (count - 2))
    total -= 2 / (count - 2) * (ones @ one @ other @ ones)
    return float(total / (count * (count - 3)))


def test_it_is_the_published_estimate() -> None:
    import torch

    from distillation.evaluation.similarity import _unit_gram

    torch.manual_seed(0)
    first = torch.randn(40, 6, dtype=torch.float64)
    second = first[:, :3] @ torch.randn(3, 9, dtype=torch.float64) + torch.randn(40, 9) * 0.5
    grams = []
    for states in (first, second):
        standard = (states - states.mean(0)) / states.std(0, correction=0)
        grams.append(standard @ standard.T)
    expected = (
        hsic(grams[0], grams[1]) / (hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])) ** 0.5
    )
    assert float(_unit_gram(first) @ _unit_gram(second)) == pytest.approx(expected, rel=1e-9)
    scaled = second * torch.linspace(0.1, 50, 9) + 3
    assert float(_unit_gram(first) @ _unit_gram(scaled)) == pytest.approx(expected, rel=1e-9)
    assert abs(float(_unit_gram(first) @ _unit_gram(torch.randn(40, 500)))) < 0.2


def test_a_model_is_most_like_itself() -> None:
    import torch

    from cleangpt.blocks import BlockStack
    from distillation.evaluation.scoring_windows import plan_windows, window_batches
    from distillation.evaluation.similarity import block_similarity, spread_windows

    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (300,)).tolist()
    windows = spread_windows(plan_windows(len(ids), 16, 16))
    assert len(windows) == 16
    assert windows[-1].start > 250
    own = BlockStack(teacher().eval())
    found = [block_similarity(own, own, window_batches(ids, windows, size)) for size in (1, 5)]
    assert found[0] is not None
    assert torch.tensor(found[0]).allclose(torch.tensor(found[1]), atol=1e-6)
    assert torch.tensor(found[0]).diagonal().allclose(torch.ones(own.num_blocks))
    other = block_similarity(BlockStack(student()), own, window_batches(ids, windows, 4))
    assert other is not None
    assert (len(other), len(other[0])) == (BlockStack(student()).num_blocks, own.num_blocks)
    assert torch.tensor(other).abs().max() < 1
    short = window_batches(ids[:10], plan_windows(10, 16, 16), 1)
    assert block_similarity(own, own, short) is None
