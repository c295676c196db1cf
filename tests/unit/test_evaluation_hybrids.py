"""The teacher with student blocks put in."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cleangpt.blocks import BlockStack
from distillation.evaluation.hybrids import can_be_mixed, score_hybrids
from distillation.evaluation.scoring_windows import plan_windows, window_batches
from tests.builders import VOCAB, tiny_student, tiny_teacher

IDS = torch.randint(1, VOCAB, (60,), generator=torch.Generator().manual_seed(0)).tolist()


def batches() -> Any:
    return window_batches(IDS, plan_windows(len(IDS), 16, 16), 2)


def kl_of(model: Any, teacher: Any) -> float:
    """The mean KL of a whole model, in one pass of its own."""
    total, count = 0.0, 0
    for batch in batches():
        with torch.no_grad():
            pair = [
                each(input_ids=batch.input_ids, attention_mask=batch.valid.long()).logits
                for each in (model, teacher)
            ]
        own, target = (F.log_softmax(logits[batch.scored], -1) for logits in pair)
        total += float((target.exp() * (target - own)).sum())
        count += int(batch.scored.sum())
    return total / count


def test_a_copy_costs_nothing() -> None:
    teacher = BlockStack(tiny_teacher("llama"))
    student = BlockStack(copy.deepcopy(teacher.model))
    for row in score_hybrids(student, teacher, range(3), batches()):
        assert row["kl_alone"] == pytest.approx(0, abs=1e-7)
        assert row["kl_chained"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_costs_are_those_of_models_with_swapped_modules(family: str) -> None:
    teacher, other = tiny_teacher(family), tiny_teacher(family, seed=5)
    rows = score_hybrids(BlockStack(other), BlockStack(teacher), range(3), batches())
    for index, row in enumerate(rows):
        alone, chained = copy.deepcopy(teacher), copy.deepcopy(teacher)
        for block in range(3):
            own = copy.deepcopy(BlockStack(other).block(block))
            if block == index:
                BlockStack(alone)._blocks[block] = own
            if block <= index:
                BlockStack(chained)._blocks[block] = own
        assert row["student_block"] == index
        assert row["kl_alone"] == pytest.approx(kl_of(alone, teacher), rel=1e-4)
        assert row["kl_chained"] == pytest.approx(kl_of(chained, teacher), rel=1e-4)


def test_a_block_stands_for_several() -> None:
    teacher = tiny_teacher()
    short = tiny_student(n_layer=1, n_embd=32)
    (row,) = score_hybrids(BlockStack(short), BlockStack(teacher), [2], batches())
    assert row["kl_alone"] == row["kl_chained"] > 0


def test_who_can_be_mixed() -> None:
    teacher = BlockStack(tiny_teacher())
    assert can_be_mixed(BlockStack(tiny_student(n_embd=32)), teacher)
    assert not can_be_mixed(BlockStack(tiny_student(n_embd=16)), teacher)
    # Factored blocks exchange two streams.
    assert not can_be_mixed(BlockStack(tiny_student("Factored", n_embd=32)), teacher)
