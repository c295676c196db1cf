"""The steps of one block in the middle of its training, once its states are at hand.

The first epoch of a block also fills the store or moves it on; the later ones are steps and nothing
else.
"""

import copy
import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.against_naive import LR
from benchmarks.cases import Shape, windows_loader
from benchmarks.ours import where
from distillation.stages import Stage
from distillation.trainers import BackboneDistillationTrainer


class SteadyTrainer(BackboneDistillationTrainer):
    """A backbone trainer that notes when each epoch of each stage ended.

    ``between(epoch)`` is called after each epoch, outside of what is timed.
    """

    between: Callable[[int], None] | None = None

    def after_epoch(self, stage: Stage, epoch: int) -> None:
        """Note the time, before and after whatever is done between epochs."""
        super().after_epoch(stage, epoch)
        ended_at = time.perf_counter()
        if self.between is not None:
            self.between(epoch)
        self.marks[stage.name].append((ended_at, time.perf_counter()))

    @property
    def marks(self) -> dict[str, list[tuple[float, float]]]:
        """By stage: end of each epoch, and start of the next."""
        found: dict[str, list[tuple[float, float]]] = self.__dict__.setdefault(
            "_marks", defaultdict(list)
        )
        return found


@dataclass
class Steps:
    """What one block's steps took.

    Args:
        steady: Seconds per step, of each epoch but the first.
        charged: Seconds per step over all epochs, the first included.
    """

    steady: list[float] = field(default_factory=list)
    charged: float = 0.0


def block_steps(
    teacher: Any,
    start: Any,
    shape: Shape,
    *,
    only: int | None = None,
    between: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Steps]:
    """Train all blocks, or only one, of a copy of ``start``; return each trained block's steps.

    Args:
        teacher: The model that is imitated.
        start: The student to copy.
        shape: How many batches and epochs.
        only: The one block that is trained; None trains all.
        between: Called after each epoch, outside of what is timed.
        **options: Keyword-only settings of the trainer.
    """
    epochs = [shape.epochs if only in (None, block) else 0 for block in range(shape.blocks)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SteadyTrainer(
            teacher,
            copy.deepcopy(start),
            None,
            windows_loader(shape),
            **where(start, folder),
            **options,
        )
        trainer.between = between
        rows = trainer.train_backbone(epochs, LR)["blocks"]
    found = []
    for row in rows:
        marks = trainer.marks.get(row["stage"], [])
        pairs = itertools.pairwise(marks)
        steady = [(after[0] - before[1]) / shape.batches for before, after in pairs]
        if marks:
            found.append(Steps(steady, row["seconds"] / max(1, row["steps"])))
    return found
