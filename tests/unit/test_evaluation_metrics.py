"""Perplexity and divergence against HuggingFace's loss and plain references."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cleangpt.blocks import BlockStack
from distillation.evaluation.metrics import (
    TokenSums,
    quality_from_sums,
    score_models,
)
from distillation.evaluation.scoring_windows import Window, plan_windows, window_batches


@pytest.fixture
def models() -> tuple[BlockStack, BlockStack]:
    from tests.builders import tiny_student, tiny_teacher

    return BlockStack(tiny_teacher("gpt2")), BlockStack(tiny_student("Vanilla").eval())


@pytest.fixture
def ids() -> list[int]:
    return torch.randint(0, 67, (90,), generator=torch.Generator().manual_seed(5)).tolist()


def scored(models: Any, ids: list[int], stride: int, batch_size: int = 3) -> list[TokenSums]:
    batches = window_batches(ids, plan_windows(len(ids), 16, stride), batch_size)
    return score_models(models, models[0], batches)


def reference_loss(model: Any, ids: list[int], seq_len: int, stride: int) -> float:
    """The mean loss, one token at a time: each with the window that scores it."""
    losses: list[float] = []
    done = 0
    while done < len(ids) - 1:
        end = min(len(ids) - 1, done + (stride if done else seq_len))
        start = max(0, end - seq_len)
        logits = model(torch.tensor([ids[start:end]])).logits[0]
        for position in range(done, end):
            log_probs = torch.log_softmax(logits[position - start], dim=-1)
            losses.append(-log_probs[ids[position + 1]].item())
        done = end
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_one_window_is_huggingface_loss(family: str) -> None:
    from tests.builders import tiny_teacher

    model = tiny_teacher(family)
    row = torch.randint(0, 67, (1, 17), generator=torch.Generator().manual_seed(5))
    stack = BlockStack(model)
    sums = score_models([stack], stack, window_batches(row[0].tolist(), plan_windows(17, 16, 8), 1))
    assert sums[0].num_tokens == 16
    loss = F.cross_entropy(model(row).logits[0, :-1], row[0, 1:]).item()
    assert sums[0].loss / 16 == pytest.approx(model(row, labels=row).loss.item(), rel=1e-5)
    assert sums[0].loss / 16 == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_sliding_window_agrees_with_the_reference(models: Any, ids: list[int], stride: int) -> None:
    for stack, sums in zip(models, scored(models, ids, stride), strict=True):
        assert sums.num_tokens == len(ids) - 1
        expected = reference_loss(stack.model, ids, 16, stride)
        assert sums.loss / sums.num_tokens == pytest.approx(expected, rel=1e-6)


def test_batch_size_changes_nothing(models: Any, ids: list[int]) -> None:
    one, many = scored(models, ids, 7, batch_size=1)[1], scored(models, ids, 7, batch_size=9)[1]
    assert (one.num_tokens, one.agreements) == (many.num_tokens, many.agreements)
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    assert one.kl == pytest.approx(many.kl, rel=1e-6)


def test_padding_changes_nothing(models: Any, ids: list[int]) -> None:
    """Windows of unequal length share a batch, and so are padded; alone they are not."""
    windows = [Window(0, 16, 0), Window(16, 21, 16), Window(21, 30, 24)]
    together = score_models(models, models[0], window_batches(ids, windows, 3))
    alone = score_models(models, models[0], window_batches(ids, windows, 1))
    for one, other in zip(together, alone, strict=True):
        assert one.num_tokens == other.num_tokens == 16 + 5 + 6
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.kl == pytest.approx(other.kl, rel=1e-5)


def test_the_teacher_is_a_perfect_student(models: Any, ids: list[int]) -> None:
    teacher = models[0]
    again = BlockStack(teacher.model)
    sums = scored([teacher, again], ids, 8)
    quality = quality_from_sums(sums[1], sums[0], num_bytes=50)
    assert quality["kl_nats"] == 0.0
    assert quality["top1_agreement"] == 1.0
    assert quality["perplexity_ratio"] == 1.0


def test_kl_is_the_definition_and_not_negative() -> None:
    own, theirs = torch.randn(300, 5), torch.randn(300, 5)  # more than one chunk
    p = theirs.softmax(-1)
    expected = (p * (p.log() - own.softmax(-1).log())).sum().item()
    sums = TokenSums()
    sums.add(own, theirs, torch.zeros(300, dtype=torch.long))
    assert sums.kl == pytest.approx(expected, rel=1e-5)
    for row in range(9):
        sums = TokenSums()
        sums.add(own[row : row + 1], theirs[row : row + 1], torch.zeros(1, dtype=torch.long))
        assert sums.kl >= 0


def test_nothing_is_float64_on_the_device() -> None:
    from tests.evaluation_samples import without_float64

    logits = torch.randn(6, 5)
    sums, expected = TokenSums(), TokenSums()
    expected.add(logits, logits.flip(0), torch.arange(5).repeat(2)[:6])
    sums.add(
        without_float64(logits),
        without_float64(logits.flip(0)),
        without_float64(torch.arange(5).repeat(2)[:6]),
    )
    assert sums == expected


def test_padded_vocabulary_rows_are_left_out_of_the_divergence() -> None:
    logits = torch.randn(6, 5)
    padded = torch.cat([logits, torch.full((6, 3), -50.0)], dim=1)
    sums = TokenSums()
    sums.add(logits, padded, torch.arange(5).repeat(2)[:6])
    assert sums.kl == pytest.approx(0.0, abs=1e-9)
    assert sums.agreements == 6


def test_the_calibration_error_by_hand() -> None:
    sure, torn = torch.tensor([5.0, 0.0]).log_softmax(-1), torch.tensor([0.0, 0.0])
    sums = TokenSums()
    # Three times the sure token comes, once not; of two tosses, both fall on the first side.
    logits = torch.stack([sure, sure, sure, sure, torn, torn])
    sums.add(logits, logits, torch.tensor([0, 0, 0, 1, 0, 0]))
    high, half = 1 / (1 + math.exp(-5)), 0.5
    expected = 4 / 6 * abs(high - 3 / 4) + 2 / 6 * abs(half - 1)
    quality = quality_from_sums(sums, sums, num_bytes=1)
    assert quality["calibration_error"] == pytest.approx(expected, rel=1e-5)
    drawn = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(20_000, 40)
    generator = torch.Generator().manual_seed(1)
    targets = torch.multinomial(drawn[0].softmax(-1), 20_000, True, generator=generator)
    sums = TokenSums()
    sums.add(drawn, drawn, targets)
    assert quality_from_sums(sums, sums, num_bytes=1)["calibration_error"] < 0.01


def test_bits_per_byte() -> None:
    sums = TokenSums(num_tokens=10, loss=10 * math.log(2))
    assert quality_from_sums(sums, sums, num_bytes=20)["bits_per_byte"] == pytest.approx(0.5)


def test_nan_and_overflow_stay_visible() -> None:
    teacher = TokenSums(num_tokens=2, loss=2.0)
    broken = quality_from_sums(TokenSums(2, float("nan"), float("nan"), 0), teacher, 1)
    assert math.isnan(broken["perplexity"])
    assert math.isnan(broken["kl_nats"])
    huge = quality_from_sums(TokenSums(2, 4000.0, 4000.0, 0), teacher, 1)
    assert huge["perplexity"] == math.inf
