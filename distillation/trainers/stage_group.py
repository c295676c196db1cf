"""Stages that train on the same batches: their epochs, validation, and checkpoints.

One stage alone is a group of one. The optimizer step is in ``stage_loop.py``.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cleangpt.errors import CheckpointError
from cleangpt.runtime.compiling import compiled
from cleangpt.runtime.module_state import tensors_checksum
from distillation.batch import Batch, rows_of
from distillation.config import StageSettings
from distillation.journal import StagePosition
from distillation.passes import passes_of
from distillation.preflight import check_same_batches
from distillation.stages import Stage
from distillation.trainers.stage_loop import (
    StageLoop,
    StageResult,
    build_optimizer,
    grouped,
)

if TYPE_CHECKING:
    from distillation.trainers.base_trainer import BaseDistillationTrainer


class StageGroup:
    """Stages with a loop and an optimizer each, taking their steps in turn for every batch.

    The stages' modules are in train mode and everything else of both models in eval mode; only the
    stages' tensors get gradients and reach the optimizers.

    Args:
        trainer: Gives models, data and run.
        name: What the progress bar and the checkpoints say.
        stages: What is trained.
        settings: How long and how fast, for each stage.
    """

    def __init__(
        self,
        trainer: "BaseDistillationTrainer",
        name: str,
        stages: Sequence[Stage],
        settings: Sequence[StageSettings],
    ) -> None:
        self.trainer = trainer
        self.name = name
        self.stages = stages
        self._only_train()
        self.epochs = max(own.epochs for own in settings)
        self.rounds = self.epochs * passes_of(trainer.train_dataloader)
        steps = trainer.steps_per_epoch() * passes_of(trainer.train_dataloader)
        self.loops = [
            StageLoop(
                stage,
                trainer.config,
                own,
                build_optimizer(trainer.optimizer_cls, stage, own),
                steps * own.epochs,
                trainer.precision,
                trainer.ranks,
            )
            for stage, own in zip(stages, settings, strict=True)
        ]
        self._earlier_seconds = 0.0

    def run(self) -> list[StageResult]:
        """Train, from the start or from where the run was stopped.

        Raises:
            NonFiniteError: After ``max_nonfinite_in_a_row`` skipped batches in a row.
            Stopped: If a signal asked for it; everything done is saved then.
        """
        trainer, loops = self.trainer, self.loops
        place = self._taken_up()
        before = self._frozen_checksum()
        names = [stage.name for stage in self.stages]
        steps = sum(loop.total_steps for loop in loops)
        done = sum(loop.step_index for loop in loops)
        trainer.progress.start_stages(self.name, names, steps, done)
        self._started_at = time.perf_counter()
        modules = [module for stage in self.stages for module in stage.compilable()]
        try:
            with compiled(modules if trainer.config.compile_blocks else ()):
                if place is None:
                    for module in trainer.journal.modules.values():
                        trainer.ranks.copy_from_main(module)  # fits may differ by rounding
                    self._validate([loop for loop in loops if loop.settings.epochs])
                    place = StagePosition(0, 0)
                for epoch in range(place.epoch, self.rounds):
                    self._train_epoch(epoch, place.steps if epoch == place.epoch else 0)
        finally:
            trainer.progress.end_stages()
            for loop in loops:  # a finished stage's gradients would stay for the whole run
                loop.optimizer.zero_grad(set_to_none=True)
        for loop in loops:
            loop.restore_best()
            loop.result.seconds = self._seconds() / len(loops)
            loop.result.summary = loop.stage.summary(trainer.ranks)
        if self._frozen_checksum() != before:
            raise AssertionError(f"{self.name} changed tensors it does not train.")
        return [loop.result for loop in loops]

    def _train_epoch(self, epoch: int, done: int) -> None:
        """Train the stages that are not done yet, if there are any.

        Args:
            epoch: Which one, of all passes.
            done: Steps of it that were taken before the run stopped.
        """
        trainer = self.trainer
        number, own = divmod(epoch, self.epochs)
        loops = [loop for loop in self.loops if own < loop.settings.epochs and not loop.has_stopped]
        if not loops:
            return
        if trainer.enter_pass(number):
            for stage in self.stages:
                stage.forget_states()
        self._start_epoch(loops, anew=not done)
        size = trainer.config.gradient_accumulation_steps
        batches = trainer.batches(epoch, number)
        for index, micro_batches in enumerate(grouped(batches, size)):
            if index == 0:
                check_same_batches(trainer.ranks, micro_batches[0])
            shares = [self._share(batch) for batch in micro_batches]
            if index < done:
                continue
            for loop in loops:
                loop.step(micro_batches, shares)
                trainer.progress.advance()
            self._log(loops)
            if trainer.journal.step_done():
                self._save(StagePosition(epoch, index + 1))
        for loop in loops:
            loop.end_epoch(trainer.run, epoch)
            trainer.after_epoch(loop.stage, epoch)
        self._validate(loops)

    def _start_epoch(self, loops: list[StageLoop], *, anew: bool) -> None:
        for loop in self.loops:
            for module in loop.stage.modules().values():
                module.train(loop in loops)
        for loop in loops if anew else ():
            loop.stage.start_epoch()
            loop.start_epoch()

    def _log(self, loops: list[StageLoop]) -> None:
        trainer, step = self.trainer, loops[0].step_index
        last = any(loop.step_index == loop.total_steps for loop in loops)
        if last or step % trainer.config.log_interval == 0:
            losses, speeds = zip(*(loop.log(trainer.run) for loop in loops), strict=True)
            mean_loss = sum(losses) / len(losses)
            trainer.progress.show(step * len(loops), mean_loss, sum(speeds))

    @torch.no_grad()
    def _validate(self, loops: list[StageLoop]) -> None:
        """Take the stages' losses on held-out data, and remember which weights were best."""
        trainer = self.trainer
        if trainer.validation_dataloader is None:
            return
        for loop in loops:
            for module in loop.stage.modules().values():
                module.eval()
        sums, counts = torch.zeros(2, len(loops), dtype=torch.float64)
        for whole in trainer.held_out_batches():
            batch = self._share(whole)
            for index, loop in enumerate(loops):
                count = loop.stage.count(batch)
                with trainer.precision.autocast(trainer.device):
                    if not count:
                        loop.stage.stand_by(batch)
                        continue
                    sums[index] += float(loop.stage.held_out_loss(batch)) * count
                counts[index] += count
        self._sum(sums, counts)
        for loop, total, count in zip(loops, sums.tolist(), counts.tolist(), strict=True):
            loop.keep_best(total / max(1, count), trainer.run)

    def _sum(self, *numbers: Tensor) -> None:
        """Sum small tensors of the host over all processes, in place."""
        on_device = [tensor.to(self.trainer.device) for tensor in numbers]
        self.trainer.ranks.sum(on_device)
        for tensor, total in zip(numbers, on_device, strict=True):
            tensor.copy_(total)

    def _share(self, batch: Batch) -> Batch:
        """What this process computes of a batch; may be no row."""
        if self.trainer.ranks.count == 1:
            return batch
        return rows_of(batch, self.trainer.ranks.share(batch.row_keys))

    def _save(self, place: StagePosition) -> None:
        tensors: dict[str, Tensor] = {}
        values = []
        for index, loop in enumerate(self.loops):
            try:
                named, own = loop.saved()
            except CheckpointError as error:
                self.trainer.journal.cannot_save(error)
                return
            tensors |= {f"{index}/{name}": tensor for name, tensor in named.items()}
            values.append(own)
        state = {"loops": values, "seconds": self._seconds()}
        self.trainer.journal.save(self.name, place, tensors, state)

    def _taken_up(self) -> StagePosition | None:
        """Take up what an interrupted run left; None if this group was not begun."""
        found = self.trainer.journal.interrupted(self.name)
        if found is None:
            return None
        place, tensors, values = found
        self._earlier_seconds = values["seconds"]
        for index, (loop, own) in enumerate(zip(self.loops, values["loops"], strict=True)):
            prefix = f"{index}/"
            named = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            loop.go_on(named, own)
        return place

    def _seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._started_at

    def _only_train(self) -> None:
        for model in (self.trainer.teacher_model, self.trainer.student_model):
            model.eval().requires_grad_(False)
        for stage in self.stages:
            for module in stage.modules().values():
                module.train()
            for parameter in stage.trainable_parameters().values():
                parameter.requires_grad_(True)

    def _frozen_checksum(self) -> str:
        trained = {
            id(parameter)
            for stage in self.stages
            for parameter in stage.trainable_parameters().values()
        }
        state = self.trainer.student_model.state_dict(keep_vars=True)
        return tensors_checksum((n, t) for n, t in state.items() if id(t) not in trained)
