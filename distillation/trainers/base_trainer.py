"""The one training loop, and the two models and the run it works on.

It knows no block and no head: a :class:`~distillation.stages.Stage` says what is trained, and
``stage_loop.py`` has the optimizer step.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError, UsageError
from cleangpt.metrics_log import RunProgress
from cleangpt.run_directory import RunDirectory
from cleangpt.runtime.device import resolve_device, seed_generators
from cleangpt.runtime.fused_gelu import fused_gelu
from cleangpt.runtime.invocation import command_line
from cleangpt.runtime.module_state import preserved_modes, tensors_fingerprint
from cleangpt.runtime.placement import to_device
from cleangpt.runtime.precision import choose_precision
from cleangpt.runtime.ranks import join
from cleangpt.structure import count_parameters
from cleangpt.trackers import tracked
from distillation.activations import Activations
from distillation.batch import Batch, as_batch
from distillation.cache_plan import positions_in
from distillation.config import DistillationConfig, StageSettings
from distillation.disk_needs import check_disk_room, disk_needs, trains_whole_student
from distillation.journal import Journal
from distillation.passes import enter_pass, passes_of
from distillation.preflight import (
    check_batch,
    check_structure,
    check_vocabulary,
    number_blocks,
    warn_of_overlap,
)
from distillation.stages import Stage
from distillation.trainers.stage_group import StageGroup
from distillation.trainers.stage_loop import StageResult, derived_seed

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
        UsageError: If the settings cannot work together, or this machine lacks the device.
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
        self.device = resolve_device(device)
        self.ranks = join(self.device)
        self.current_pass = 0
        self.run = run
        self.optimizer_cls = optimizer_cls
        self.config = config
        self.teacher = BlockStack(teacher_model)
        self.student = BlockStack(student_model)
        self.activations = Activations(self.teacher, self.student, 0)
        precision = choose_precision(config.precision, self.device, self.student.hidden_size)
        self.precision = self.ranks.from_main(precision)  # each measures for itself
        self.progress = RunProgress(1)
        self.journal = Journal({"student": student_model}, self.ranks, minutes=0.0, steps=0)
        number_blocks(self.student)
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
            "command": command_line(),
            "seed": self.config.seed,
            "device": str(self.device),
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
            "torch_threads": torch.get_num_threads(),
            "processes": self.ranks.count,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "attention": [
                getattr(model.config, "_attn_implementation", None)
                for model in (self.teacher_model, self.student_model)
            ],
            "precision": {"used": self.precision.name, "reason": self.precision.reason},
            "data": described(self.train_dataloader),
            "validation_data": described(self.validation_dataloader),
            "optimizer": getattr(self.optimizer_cls, "__name__", str(self.optimizer_cls)),
            "data_fingerprint": getattr(dataset, "fingerprint", None),
            "data_sketch": getattr(dataset, "sketch", None),
            "teacher": {
                "class": type(self.teacher_model).__name__,
                "fingerprint": tensors_fingerprint(
                    self.teacher_model.state_dict().items(), self.teacher_model
                ),
                "name": str(getattr(self.teacher.model.config, "name_or_path", "")),
                "parameters": count_parameters(self.teacher_model),
            },
            "student": {
                "class": type(self.student_model).__name__,
                "parameters": count_parameters(self.student_model),
                "config": config_fingerprint(self.student_model.config),
            },
            # What an evaluation needs to build the student of a checkpoint again.
            "student_config": plain_config(self.student_model.config),
        }

    @contextmanager
    def running(self, num_stages: int, overwrite: bool, resume: bool = False) -> Iterator[None]:
        """Everything around the stages of one call.

        Both models on the device, the run's directory held, and afterwards the modes, the random
        state and the memory as before. A trainer inside a larger run joins that run.
        """
        to_device(self.teacher_model, self.device)
        self.student_model.to(self.device)
        if not self.run.is_open:
            self.ranks.copy_from_main(self.student_model)
            self.progress = RunProgress(num_stages)
            logger.info("Precision: %s (%s).", self.precision.name, self.precision.reason)
            warn_of_overlap(self.train_dataloader, self.validation_dataloader)
        exact = self.precision.name == "fp32"
        with (
            torch.random.fork_rng(),
            preserved_modes(self.teacher_model, self.student_model),
            # Asked for exactness, the teacher computes as it does anywhere else.
            nullcontext() if exact else fused_gelu(self.teacher_model, self.student_model),
            self.precision.tensor_cores(self.device),
            self.run.opened(self.about_run(), overwrite=overwrite, resume=resume),
            tracked(self.run, self.config.track, asdict(self.config)),
            self.ranks.after_main(),
            self.activations.opened(
                self.config,
                self._states_folder(),
                self._positions(),
                self.precision.name,
            ),
        ):
            # The first process alone writes it down, and all name files by it.
            self.run.run_id = self.ranks.from_main(self.run.run_id)
            yield

    def enter_pass(self, number: int) -> bool:
        """Go to a pass over the data, counted from where the stage begins; see ``passes.py``.

        Returns:
            Whether the windows are others than before: what was kept of those is forgotten then.
        """
        self.current_pass = number
        index = (number - self.journal.stages_trained) % passes_of(self.train_dataloader)
        is_other = enter_pass(self.train_dataloader, index, self.run)
        if is_other:
            self.activations.forget()
        return is_other

    def batches(self, epoch: int, pass_number: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, on the training device.

        A loader that shuffles by PyTorch's global generator gives them in the same order whenever
        it is asked again, whatever was drawn before.

        Args:
            epoch: Decides their order.
            pass_number: Which of the stage's passes over data that come in several.

        Raises:
            InputError: If the loader is empty, or a batch does not fit the models.
        """
        self.enter_pass(pass_number)
        seed_generators(derived_seed(self.config.seed, f"epoch {epoch}"), self.device)
        loader: Any = self.train_dataloader
        owners: list[Any] = [loader, getattr(loader, "sampler", None)]
        for owner in owners:
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
        yield from self._checked(self.train_dataloader)

    def batches_to_measure(self) -> Iterator[Batch]:
        """The batches of the first epoch, for what is measured or fitted before a stage learns.

        Raises:
            Stopped: If a signal asked for it.
        """
        for batch in self.batches(0):
            self.journal.stop_if_asked("between two stages")
            yield batch

    def held_out_batches(self) -> Iterator[Batch]:
        """The held-out batches; none without a validation_dataloader."""
        if self.validation_dataloader is not None:
            yield from self._checked(self.validation_dataloader)

    def _checked(self, loader: Any) -> Iterator[Batch]:
        for raw in loader:
            batch = as_batch(raw, self.device)
            check_batch(batch, self.teacher, self.student)
            yield batch

    def check_disk_room(self, *, trains_all: bool, overwrite: bool, keeps_start: bool) -> None:
        """Refuse a run that its disk has no room for; see :mod:`distillation.disk_needs`.

        Args:
            trains_all: Whether a later stage trains the whole student.
            overwrite: Whether the files of an earlier run go.
            keeps_start: Whether the untrained student is written.

        Raises:
            EnvironmentProblem: If there is too little room.
        """
        if not self.run.writes or self.run.is_open:
            return
        config, folder = self.config, self._states_folder()
        self.activations.plan(config, folder, self._positions())
        needs = disk_needs(
            self.teacher,
            self.student,
            trains_all=trains_all
            or trains_whole_student(config.schedule, config.freeze_previous_blocks),
            states=self.activations.expected["disk"],
            keeps_start=keeps_start,
        )
        check_disk_room(self.run.path, needs, overwrite=overwrite)

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

        For each batch the stages take their steps in order. Afterwards a checksum proves that no
        other tensor of the student moved. What a resumed run had finished is not done again.

        Args:
            name: What the progress bar says.
            stages: What is trained.
            settings: How long and how fast, for each stage.

        Raises:
            NonFiniteError: After ``max_nonfinite_in_a_row`` skipped batches in a row.
        """
        known = self.journal.finished(name)
        if known is not None:
            logger.info("%s was finished before the run stopped.", name)
            self.progress.skip_stages([stage.name for stage in stages])
            return [StageResult(**values) for values in known]
        results = StageGroup(self, name, stages, settings).run()
        self.journal.finish(name, [asdict(result) for result in results])
        return results

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
        """Optimizer steps of one epoch of one pass over the data.

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

    def after_epoch(self, stage: Stage, epoch: int) -> None:
        """Called after each epoch of a stage; does nothing here."""


def described(loader: Any) -> dict[str, Any] | None:
    """What tells the data of one run from that of another, so far as a loader says."""
    if loader is None:
        return None
    dataset = getattr(loader, "dataset", None)
    return {
        "fingerprint": getattr(dataset, "fingerprint", None),
        "block_size": getattr(dataset, "block_size", None),
        "batch_size": getattr(loader, "batch_size", None),
        "batches": len(loader) if hasattr(loader, "__len__") else None,
    }


def config_fingerprint(config: Any) -> str:
    """A hash of a model's configuration, but for what a run itself changes in it."""
    fields = {k: v for k, v in config.to_dict().items() if k != "tie_word_embeddings"}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def plain_config(config: Any) -> dict[str, Any]:
    """A model's configuration as JSON holds it."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return plain
