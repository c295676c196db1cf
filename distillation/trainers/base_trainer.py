"""The one training loop, and the two models and the run it works on.

It knows no block and no head: a :class:`~distillation.stages.Stage` says what is trained, and
``stage_loop.py`` has the optimizer step.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError, UsageError
from cleangpt.metrics_log import RunProgress
from cleangpt.run_directory import RunDirectory
from cleangpt.runtime.compiling import compiled
from cleangpt.runtime.device import seed_generators
from cleangpt.runtime.fused_gelu import fused_gelu
from cleangpt.runtime.module_state import (
    preserved_modes,
    tensors_checksum,
    tensors_fingerprint,
)
from cleangpt.runtime.precision import choose_precision
from cleangpt.runtime.ranks import RowShares, join
from distillation.activations import Activations, rows_of
from distillation.batch import Batch, as_batch
from distillation.cache_plan import positions_in
from distillation.config import DistillationConfig, StageSettings
from distillation.preflight import (
    check_batch,
    check_same_batches,
    check_structure,
    check_vocabulary,
)
from distillation.stages import Stage
from distillation.trainers.stage_loop import (
    StageLoop,
    StageResult,
    build_optimizer,
    derived_seed,
    grouped,
)

logger = logging.getLogger(__name__)


class BaseDistillationTrainer:
    """The two models, the data and the run, with the loop that trains one stage.

    Args:
        teacher_model: A HuggingFace causal LM. It is never changed.
        student_model: The model that learns, in place.
        tokenizer: The teacher's tokenizer; saved beside the student. None if there is none.
        train_dataloader: Yields ``{"input_ids", "attention_mask"}``; see
            :func:`~distillation.batch.as_batch` for other forms. If it, or its sampler, has
            ``set_epoch``, each epoch calls it, so that the order can be a function of the epoch.
        device: Where the training runs; both models are moved there.
        run: The run's directory.
        optimizer_cls: Called as ``optimizer_cls(parameter_groups, lr=...)``.
        config: The run's settings.
        validation_dataloader: Held-out batches of the same form. Before the first epoch and after
            each, the stage's loss on them is written down; its best weights are kept, which may be
            those it started from.

    Raises:
        InputError: If a model's blocks cannot be found, or vocabularies do not match.
        UsageError: If the settings cannot work together.
    """

    def __init__(
        self,
        teacher_model: nn.Module,
        student_model: nn.Module,
        tokenizer: Any,
        train_dataloader: Any,
        *,
        device: torch.device,
        run: RunDirectory,
        optimizer_cls: Callable[..., Any],
        config: DistillationConfig,
        validation_dataloader: Any = None,
    ) -> None:
        self.teacher_model = teacher_model
        self.student_model = student_model
        self.tokenizer = tokenizer
        self.train_dataloader = train_dataloader
        self.validation_dataloader = validation_dataloader
        self.device = torch.device(device)
        self.ranks = join(self.device)
        self.shares = RowShares(self.ranks)
        self.run = run
        self.optimizer_cls = optimizer_cls
        self.config = config
        self.teacher = BlockStack(teacher_model)
        self.student = BlockStack(student_model)
        self.activations = Activations(self.teacher, self.student, 0)
        precision = choose_precision(config.precision, self.device, self.student.hidden_size)
        self.precision = self.ranks.from_main(precision)  # each measures for itself
        self.progress = RunProgress(1)
        for stack in (self.teacher, self.student):
            check_structure(stack)
        check_vocabulary(self.teacher, self.student, tokenizer)
        if config.early_stop_patience and validation_dataloader is None:
            raise UsageError(
                f"early_stop_patience={config.early_stop_patience} waits for a better validation"
                " loss, and there is no validation_dataloader.",
                "Give the trainer a validation_dataloader, or set early_stop_patience=0.",
            )

    def about_run(self) -> dict[str, Any]:
        """What the manifest says of this run."""
        dataset = getattr(self.train_dataloader, "dataset", None)
        return {
            "seed": self.config.seed,
            "device": str(self.device),
            "torch_version": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "precision": {"used": self.precision.name, "reason": self.precision.reason},
            "data_fingerprint": getattr(dataset, "fingerprint", None),
            "data_sketch": getattr(dataset, "sketch", None),
            "teacher": {
                "class": type(self.teacher_model).__name__,
                "fingerprint": tensors_fingerprint(self.teacher_model.state_dict().items()),
                "name": str(getattr(self.teacher.model.config, "name_or_path", "")),
                "parameters": count_parameters(self.teacher_model),
            },
            "student": {
                "class": type(self.student_model).__name__,
                "parameters": count_parameters(self.student_model),
            },
        }

    @contextmanager
    def running(self, num_stages: int, overwrite: bool) -> Iterator[None]:
        """Everything around the stages of one call.

        Both models on the device, the run's directory held, and afterwards the modes, the random
        state and the memory as before. A trainer inside a larger run joins that run.
        """
        self.teacher_model.to(self.device)
        self.student_model.to(self.device)
        if not self.run.is_open:
            self.ranks.copy_from_main(self.student_model)
            self.progress = RunProgress(num_stages)
            logger.info("Precision: %s (%s).", self.precision.name, self.precision.reason)
        exact = self.precision.name == "fp32"
        with (
            torch.random.fork_rng(),
            preserved_modes(self.teacher_model, self.student_model),
            # Asked for exactness, the teacher computes as it does anywhere else.
            nullcontext() if exact else fused_gelu(self.teacher_model, self.student_model),
            self.precision.tensor_cores(self.device),
            self.run.opened(self.about_run(), overwrite=overwrite),
            self.ranks.after_main(),
            self.activations.opened(
                self.config,
                self._states_folder(),
                self._positions(),
                self.precision.name,
            ),
        ):
            yield

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, on the training device.

        Raises:
            InputError: If the loader is empty, or a batch does not fit the models.
        """
        loader: Any = self.train_dataloader
        owners: list[Any] = [loader, getattr(loader, "sampler", None)]
        for owner in owners:
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
        yield from self._checked(self.train_dataloader)

    def _checked(self, loader: Any) -> Iterator[Batch]:
        for raw in loader:
            batch = as_batch(raw, self.device)
            check_batch(batch, self.teacher, self.student)
            yield batch

    def _states_folder(self) -> Path:
        """Where files of states go; each process has its own."""
        folder = self.run.path / "activations"
        return folder if self.ranks.count == 1 else folder / f"rank-{self.ranks.index}"

    def _positions(self) -> int | None:
        """The tokens whose states may be kept; None if a loader does not tell."""
        loaders = [self.train_dataloader, self.validation_dataloader]
        found = [positions_in(loader) for loader in loaders if loader is not None]
        return None if None in found else sum(count or 0 for count in found)

    def train_stage(self, stage: Stage, settings: StageSettings) -> StageResult:
        """Train one stage and return what it did; see :meth:`train_together`."""
        (result,) = self.train_together(stage.name, [stage], [settings])
        return result

    def train_together(
        self, name: str, stages: Sequence[Stage], settings: Sequence[StageSettings]
    ) -> list[StageResult]:
        """Train stages on the same batches, each with an optimizer of its own.

        For each batch the stages take their steps in order. The stages' modules are in train mode
        and everything else of both models in eval mode; only the stages' tensors get gradients and
        reach the optimizers. Afterwards a checksum proves that no other tensor of the student
        moved.

        Args:
            name: What the progress bar says.
            stages: What is trained.
            settings: How long and how fast, for each stage.

        Raises:
            NonFiniteError: After ``max_nonfinite_in_a_row`` skipped batches in a row.
        """
        self._only_train(stages)
        steps = self.steps_per_epoch()
        loops = [
            StageLoop(
                stage,
                self.config,
                own,
                build_optimizer(self.optimizer_cls, stage, own),
                steps * own.epochs,
                self.precision,
                self.ranks,
            )
            for stage, own in zip(stages, settings, strict=True)
        ]
        before = self._frozen_checksum(stages)
        self.progress.start_stage(name, sum(loop.total_steps for loop in loops))
        started_at = time.perf_counter()
        modules = [module for stage in stages for module in stage.compilable()]
        try:
            with compiled(modules if self.config.compile_blocks else ()):
                self._validate([loop for loop in loops if loop.settings.epochs])
                for epoch in range(max(own.epochs for own in settings)):
                    if not self._train_epoch(loops, epoch):
                        break
        finally:
            self.progress.end_stage()
            for loop in loops:  # a finished stage's gradients would stay for the whole run
                loop.optimizer.zero_grad(set_to_none=True)
        for loop in loops:
            loop.restore_best()
            loop.result.seconds = (time.perf_counter() - started_at) / len(loops)
            loop.result.summary = loop.stage.summary(self.ranks)
        if self._frozen_checksum(stages) != before:
            raise AssertionError(f"{name} changed tensors it does not train.")
        return [loop.result for loop in loops]

    def write_logit_row(self, kind: str, result: StageResult, rate: str) -> dict[str, Any]:
        """Write down what a stage on logits did, and say so.

        Args:
            kind: "head" or "polish".
            result: What it did.
            rate: The name of its learning rate, for when that was too high.
        """
        row = result.row()
        self.run.metrics.write(kind, **row)
        self.run.add_stage(row)
        if not result.epoch_losses:
            return row
        shown = (row[k] for k in ("first_loss", "best_loss", "last_loss", "seconds"))
        logger.info("%s: first loss %.4g, best %.4g, last %.4g, %.1f s", kind.capitalize(), *shown)
        losses = result.validation_losses or [result.first_loss, result.last_loss]
        if losses[-1] > losses[0]:
            outcome = "" if result.kept_epochs is None else "; the best weights were kept"
            logger.warning(
                "The %s ended at a higher loss (%.4g) than it began with (%.4g)%s. Lower %s.",
                *(kind, losses[-1], losses[0], outcome, rate),
            )
        return row

    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data.

        Raises:
            UsageError: If the loader has no length.
            InputError: If it is empty.
        """
        try:
            num_batches = len(self.train_dataloader)
        except TypeError as error:
            raise UsageError(
                "The train_dataloader has no length, so the learning-rate schedule has no end.",
                "Use a map-style dataset, or wrap the loader in an object with __len__.",
            ) from error
        if num_batches == 0:
            raise InputError(
                "The train_dataloader is empty.",
                "Give it more text, or lower batch_size or drop_last.",
            )
        return math.ceil(num_batches / self.config.gradient_accumulation_steps)

    def _train_epoch(self, all_loops: list[StageLoop], epoch: int) -> bool:
        """Train the stages that are not done yet; return whether there were any."""
        loops = [
            loop for loop in all_loops if epoch < loop.settings.epochs and not loop.has_stopped
        ]
        if not loops:
            return False
        for loop in all_loops:
            for module in loop.stage.modules().values():
                module.train(loop in loops)
        seed = derived_seed(self.config.seed, loops[0].stage.name, f"epoch {epoch}")
        seed_generators(seed, self.device)
        for loop in loops:
            loop.stage.start_epoch()
            loop.start_epoch()
        size = self.config.gradient_accumulation_steps
        for index, micro_batches in enumerate(grouped(self.batches(epoch), size)):
            if index == 0:
                check_same_batches(self.ranks, micro_batches[0])
            shares = [self._share(batch) for batch in micro_batches]
            for loop in loops:
                loop.step(micro_batches, shares)
                self.progress.advance()
            step = loops[0].step_index
            last = any(loop.step_index == loop.total_steps for loop in loops)
            if last or step % self.config.log_interval == 0:
                losses, speeds = zip(*(loop.log(self.run) for loop in loops), strict=True)
                mean_loss, done = sum(losses) / len(losses), step * len(loops)
                self.progress.show(done, mean_loss, sum(speeds))
        for loop in loops:
            loop.end_epoch(self.run, epoch)
            self.after_epoch(loop.stage, epoch)
        self._validate(loops)
        return True

    @torch.no_grad()
    def _validate(self, loops: list[StageLoop]) -> None:
        """Take the stages' losses on held-out data, and remember which weights were best."""
        if self.validation_dataloader is None:
            return
        for loop in loops:
            for module in loop.stage.modules().values():
                module.eval()
        sums, counts = torch.zeros(2, len(loops), dtype=torch.float64)
        for whole in self._checked(self.validation_dataloader):
            batch = self._share(whole)
            for index, loop in enumerate(loops):
                count = 0 if batch is None else loop.stage.count(batch)
                if batch is not None and count:
                    with self.precision.autocast(self.device):
                        sums[index] += float(loop.stage.held_out_loss(batch)) * count
                    counts[index] += count
        self._sum(sums, counts)
        for loop, total, count in zip(loops, sums.tolist(), counts.tolist(), strict=True):
            loop.keep_best(total / max(1, count), self.run)

    def _sum(self, *numbers: Tensor) -> None:
        """Sum small tensors of the host over all processes, in place."""
        on_device = [tensor.to(self.device) for tensor in numbers]
        self.ranks.sum(on_device)
        for tensor, total in zip(numbers, on_device, strict=True):
            tensor.copy_(total)

    def _share(self, batch: Batch) -> Batch | None:
        """What this process computes of a batch; None is nothing."""
        if self.ranks.count == 1:
            return batch
        rows = self.shares.own(batch.row_keys)
        return rows_of(batch, rows) if rows else None

    def after_epoch(self, stage: Stage, epoch: int) -> None:
        """Called after each epoch of a stage; does nothing here."""

    def _only_train(self, stages: Sequence[Stage]) -> None:
        for model in (self.teacher_model, self.student_model):
            model.eval().requires_grad_(False)
        for stage in stages:
            for module in stage.modules().values():
                module.train()
            for parameter in stage.trainable_parameters().values():
                parameter.requires_grad_(True)

    def _frozen_checksum(self, stages: Sequence[Stage]) -> str:
        trained = {
            id(parameter) for stage in stages for parameter in stage.trainable_parameters().values()
        }
        state = self.student_model.state_dict(keep_vars=True)
        return tensors_checksum((n, t) for n, t in state.items() if id(t) not in trained)


def count_parameters(model: nn.Module) -> int:
    """Stored parameters; a tensor shared by two modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
