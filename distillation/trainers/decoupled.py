"""Blocks that do not wait for each other: each learns in one process, on all the data.

No gradient is exchanged. What a block learns depends on the seed and its own name alone, so it does
not matter which process trains it, in which order, or how many there are. Every block has
checkpoints of its own until all are done; a stopped run goes on with any number of processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from torch import Tensor

from cleangpt.runtime.ranks import Ranks
from distillation.config import StageSettings
from distillation.journal import Journal, StagePosition
from distillation.preflight import check_same_batches
from distillation.stages import Stage
from distillation.trainers.stage_loop import StageResult

if TYPE_CHECKING:
    from distillation.trainers.base_trainer import BaseDistillationTrainer

NAME = "decoupled blocks"


class DecoupledBlocks:
    """Stages that are spread over the processes of the run, neighbours together.

    Args:
        trainer: Gives models, data and run.
        stages: What is trained; no stage may read what another one trains.
        settings: How long and how fast, for each stage.
    """

    def __init__(
        self,
        trainer: "BaseDistillationTrainer",
        stages: Sequence[Stage],
        settings: Sequence[StageSettings],
    ) -> None:
        self.trainer = trainer
        self.stages = stages
        self.settings = settings

    def run(self) -> list[StageResult]:
        """Train them all, and give every process all of their weights.

        Raises:
            NonFiniteError: After ``max_nonfinite_in_a_row`` skipped batches in a row.
            Stopped: If a signal asked for it; everything done is saved then.
        """
        trainer = self.trainer
        journal, ranks = trainer.journal, trainer.ranks
        known = journal.finished(NAME)
        if known is not None:
            trainer.progress.skip_stages([stage.name for stage in self.stages])
            for stage in self.stages:
                journal.remove_part(stage.name)
            return [StageResult(**values) for values in known]
        if journal.interrupted(NAME) is None:
            # The start and the settings are safe before any block has a checkpoint of its own.
            journal.save(NAME, StagePosition(0, 0), {}, {})
        check_same_batches(ranks, next(iter(trainer.batches(0))))
        for module in journal.modules.values():  # what each process fitted may differ by rounding
            ranks.copy_from_main(module)
        group = ranks.patient_group()
        owners = [index * ranks.count // len(self.stages) for index in range(len(self.stages))]
        others = [
            stage.name
            for stage, owner in zip(self.stages, owners, strict=True)
            if owner != ranks.index
        ]
        trainer.progress.skip_stages(others)
        own = {
            index: asdict(self._train(index))
            for index, owner in enumerate(owners)
            if owner == ranks.index
        }
        for index, owner in enumerate(owners):
            ranks.copy_from(owner, self._weights(index), group)
        every = {k: values for part in ranks.gathered(own, group) for k, values in part.items()}
        results = [every[index] for index in range(len(self.stages))]
        for stage in self.stages:
            journal.take_in_part(stage.name)
        journal.finish(NAME, results, always=True)  # the parts' own checkpoints go
        for stage in self.stages:
            journal.remove_part(stage.name)
        return [StageResult(**values) for values in results]

    def _train(self, index: int) -> StageResult:
        stage = self.stages[index]
        with self._alone(self.trainer.journal.apart(stage.name, stage.modules())):
            return self.trainer.train_stage(stage, self.settings[index])

    def _weights(self, index: int) -> list[Tensor]:
        modules = self.stages[index].modules()
        return [tensor for module in modules.values() for tensor in module.state_dict().values()]

    @contextmanager
    def _alone(self, journal: Journal) -> Iterator[None]:
        """Let the trainer train as if there were no other process."""
        trainer = self.trainer
        before = trainer.journal, trainer.ranks, trainer.run.metrics
        trainer.journal, trainer.ranks = journal, Ranks()
        if journal.metrics.path is not None:
            trainer.run.metrics = journal.metrics
        try:
            yield
        finally:
            trainer.journal, trainer.ranks, trainer.run.metrics = before
