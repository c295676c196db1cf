"""The one training loop, and the two models and the run it works on.

It knows no block and no head: a :class:`~distillation.stages.Stage` says what is trained, and
``stage_loop.py`` has the optimizer step.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError, UsageError
from cleangpt.metrics_log import RunProgress
from cleangpt.run_directory import RunDirectory
from cleangpt.runtime.device import seed_generators
from cleangpt.runtime.module_state import preserved_modes, tensors_fingerprint
from distillation.activations import Activations, cache_budget
from distillation.batch import Batch, as_batch
from distillation.config import DistillationConfig, StageSettings
from distillation.preflight import check_batch, check_vocabulary
from distillation.stages import Stage
from distillation.trainers.stage_loop import (
    StageLoop,
    StageResult,
    derived_seed,
    grouped,
    parameter_groups,
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
    ) -> None:
        self.teacher_model = teacher_model
        self.student_model = student_model
        self.tokenizer = tokenizer
        self.train_dataloader = train_dataloader
        self.device = torch.device(device)
        self.run = run
        self.optimizer_cls = optimizer_cls
        self.config = config
        self.teacher = BlockStack(teacher_model)
        self.student = BlockStack(student_model)
        budget = cache_budget(config.activation_cache, self.device)
        self.activations = Activations(self.teacher, self.student, budget)
        self.progress = RunProgress(1)
        check_vocabulary(self.teacher, self.student, tokenizer)

    def about_run(self) -> dict[str, Any]:
        """What the manifest says of this run."""
        dataset = getattr(self.train_dataloader, "dataset", None)
        return {
            "seed": self.config.seed,
            "device": str(self.device),
            "torch_version": torch.__version__,
            "torch_threads": torch.get_num_threads(),
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
        joined = self.run.is_open
        self.teacher_model.to(self.device)
        self.student_model.to(self.device)
        if not joined:
            self.progress = RunProgress(num_stages)
        try:
            with (
                torch.random.fork_rng(),
                preserved_modes(self.teacher_model, self.student_model),
                self.run.opened(self.about_run(), overwrite=overwrite),
            ):
                yield
        finally:
            # The student may change before the next call, and states of it would be wrong then.
            if not joined:
                self.activations.forget()

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
        for raw in self.train_dataloader:
            batch = as_batch(raw, self.device)
            check_batch(batch, self.teacher, self.student)
            yield batch

    def train_stage(self, stage: Stage, settings: StageSettings) -> StageResult:
        """Train one stage and return what it did.

        The stage's modules are in train mode and everything else of both models in eval mode; only
        the stage's tensors get gradients and reach the optimizer. Afterwards a hash proves that no
        other tensor of the student moved.

        Raises:
            NonFiniteError: After ``max_nonfinite_in_a_row`` skipped batches in a row.
        """
        progress = self.progress
        parameters = stage.trainable_parameters()
        self._only_train(stage, parameters)
        optimizer = self.optimizer_cls(parameter_groups(stage, settings), lr=settings.lr)
        total_steps = self.steps_per_epoch() * settings.epochs
        loop = StageLoop(
            stage, self.config, settings, optimizer, list(parameters.values()), total_steps
        )
        before = self._frozen_fingerprint(parameters)
        progress.start_stage(stage.name, total_steps)
        started_at = time.perf_counter()
        try:
            for epoch in range(settings.epochs):
                self._train_epoch(loop, epoch, progress)
        finally:
            progress.end_stage()
        result = loop.result
        result.seconds = time.perf_counter() - started_at
        result.summary = stage.summary()
        if self._frozen_fingerprint(parameters) != before:
            raise AssertionError(f"Stage {stage.name} changed tensors it does not train.")
        return result

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

    def _train_epoch(self, loop: StageLoop, epoch: int, progress: RunProgress) -> None:
        seed = derived_seed(self.config.seed, loop.stage.name, f"epoch {epoch}")
        seed_generators(seed, self.device)
        loop.stage.start_epoch()
        loop.start_epoch()
        size = self.config.gradient_accumulation_steps
        for micro_batches in grouped(self.batches(epoch), size):
            loop.step(micro_batches)
            progress.advance()
            last = loop.step_index == loop.total_steps
            if last or loop.step_index % self.config.log_interval == 0:
                loop.log(self.run, progress)
        loop.end_epoch(self.run, epoch)
        self.after_epoch(loop.stage, epoch)

    def after_epoch(self, stage: Stage, epoch: int) -> None:
        """Called after each epoch of a stage; does nothing here."""

    def _only_train(self, stage: Stage, parameters: dict[str, nn.Parameter]) -> None:
        for model in (self.teacher_model, self.student_model):
            model.eval().requires_grad_(False)
        for module in stage.modules().values():
            module.train()
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    def _frozen_fingerprint(self, trained: dict[str, nn.Parameter]) -> str:
        ids = {id(parameter) for parameter in trained.values()}
        state = self.student_model.state_dict(keep_vars=True)
        return tensors_fingerprint((n, t) for n, t in state.items() if id(t) not in ids)


def count_parameters(model: nn.Module) -> int:
    """Stored parameters; a tensor shared by two modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
