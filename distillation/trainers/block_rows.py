"""What is said of each block that has learnt: numbers, and a verdict in words."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from cleangpt.runtime.module_state import preserved_modes
from distillation.batch import Batch, in_parts
from distillation.fit_statistics import FitStatistics
from distillation.stages import BlockStage, comparable
from distillation.trainers.stage_loop import StageResult

ROW = "%5s  %7s  %10s  %10s  %10s  %14s  %8s  %s"
COLUMNS = ("block", "teacher", "first", "best", "last", "relative error", "seconds", "")
CHAIN_TOKENS = 4096
"""How many positions the errors of the chain are measured on."""


def block_row(stage: BlockStage, result: StageResult) -> dict[str, Any]:
    """One line of the table of blocks."""
    relative_error = result.summary["relative_error"]
    return {
        **result.row(),
        "block": stage.block,
        "teacher_block": stage.teacher_block,
        "relative_error": relative_error,
        "verdict": verdict(result, relative_error),
    }


def verdict(result: StageResult, relative_error: float) -> str:
    """What the numbers of a block say, in words.

    ``relative_error`` is the squared error as a share of the teacher's variation about its mean: a
    block that only learnt the mean has 1.0. For a loss other than a squared error it is a second
    opinion: ``kl_div`` may be low where it is high.
    """
    if result.steps == 0 or math.isnan(relative_error):
        return "not trained"
    limits = [(0.05, "very close"), (0.2, "close"), (0.6, "partly learnt"), (1.0, "weak")]
    words = [text for limit, text in limits if relative_error < limit]
    if words:
        return words[0]
    # Held-out losses where there are any: a fitted stitch knows its own data better than others.
    losses = result.validation_losses or [result.first_loss, result.last_loss]
    diverged = losses[-1] > losses[0]
    return "diverged: lower lr_per_block" if diverged else "no better than the mean"


def shown_row(row: dict[str, Any]) -> tuple[Any, ...]:
    """A row as the cells of ``ROW``."""
    numbers = (f"{row[k]:.4g}" for k in ("first_loss", "best_loss", "last_loss"))
    relative, seconds = f"{row['relative_error']:.4g}", f"{row['seconds']:.1f}"
    return row["block"], row["teacher_block"], *numbers, relative, seconds, row["verdict"]


@torch.no_grad()
def chained_errors(
    stages: Sequence[BlockStage], batches: Iterable[Batch], max_tokens: int = CHAIN_TOKENS
) -> list[float]:
    """The relative error of each block's states where all blocks follow each other.

    As ``relative_error``, which is of the inputs that the block learnt on.

    Args:
        stages: One per student block, in order.
        batches: Data to measure on.
        max_tokens: Stop after this many compared positions.
    """
    student, teacher = stages[0].student, stages[0].activations.teacher
    fits = [FitStatistics.empty(teacher.hidden_size, teacher.device) for _ in stages]
    last = max(stage.teacher_block for stage in stages)
    with preserved_modes(student.model, teacher.model):
        student.model.eval()
        teacher.model.eval()
        for batch in in_parts(batches):
            states = student.block_hidden_states(batch.input_ids, batch.mask)
            targets = teacher.block_hidden_states(batch.input_ids, batch.mask, stop_after=last)
            compared = batch.without_first(stages[0].first_position)
            for stage, state, fit in zip(stages, states[1:], fits, strict=True):
                own = compared.valid(stage.stitched(state))
                target = compared.valid(targets[stage.teacher_block + 1])
                fit.add(*comparable(stage.loss_fn, own, target))
            if fits[0].count >= max_tokens:
                break
    return [fit.relative_error() for fit in fits]
