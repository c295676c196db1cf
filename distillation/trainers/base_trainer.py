"""The one training loop, and the two models and the run it works on.

It knows no block and no head: a :class:`~distillation.stages.Stage` says what is trained. Per
optimizer step: fetch the micro-batches, count valid positions, weigh each loss by its share of the
count, backward, clip, check that loss and norm are finite, and only then step. So accumulation,
padding and ragged batches change neither loss nor gradient.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError, NonFiniteError, UsageError
from cleangpt.metrics_log import RunProgress
from cleangpt.run_directory import RunDirectory
from cleangpt.runtime.device import seed_generators
from cleangpt.runtime.module_state import tensors_fingerprint
from cleangpt.schedules import learning_rate_factor
from distillation.activations import Activations, cache_budget
from distillation.batch import Batch, as_batch
from distillation.config import DistillationConfig, StageSettings
from distillation.preflight import check_batch, check_vocabulary
from distillation.stages import Stage

logger = logging.getLogger(__name__)


@dataclass
class StageResult:
    """What one stage did.

    Args:
        name: The stage's name.
        epoch_losses: Mean loss of each epoch, over valid positions.
        first_loss: Loss of the first step that was taken; NaN if none was.
        steps: Optimizer steps taken.
        skipped: Batches skipped: a loss or gradient was not finite, or no position was valid.
        tokens: Valid positions seen.
        seconds: Wall time.
        summary: What the stage itself measured.
    """

    name: str
    epoch_losses: list[float] = field(default_factory=list)
    first_loss: float = math.nan
    steps: int = 0
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0
    summary: dict[str, float] = field(default_factory=dict)

    @property
    def last_loss(self) -> float:
        """Mean loss of the last epoch; NaN if nothing was trained."""
        return self.epoch_losses[-1] if self.epoch_losses else math.nan

    @property
    def best_loss(self) -> float:
        """Lowest epoch mean; NaN if nothing was trained."""
        return min(self.epoch_losses, default=math.nan)


class BaseDistillationTrainer:
    """The two models, the data and the run, with the loop that trains one stage.

    Args:
        teacher_model: A HuggingFace causal LM. It is never changed.
        student_model: The model that learns, in place.
        tokenizer: The teacher's tokenizer; saved beside the student. None if there is none.
        train_dataloader: Yields ``{"input_ids", "attention_mask"}``; see
            :func:`~distillation.activations.as_batch` for other forms. If it, or its sampler, has
            ``set_epoch``, each epoch calls it, so that the order can be a function of the epoch.
        device: Where the training runs; both models are moved there.
        run: The run's directory, or its path.
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
        self.progress: RunProgress | None = None
        check_vocabulary(self.teacher, self.student, tokenizer)

    def about_run(self) -> dict[str, Any]:
        """What the manifest says of this run."""
        return {
            "seed": self.config.seed,
            "device": str(self.device),
            "torch_version": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "teacher": {
                "class": type(self.teacher_model).__name__,
                "name": str(getattr(self.teacher.model.config, "name_or_path", "")),
                "parameters": count_parameters(self.teacher_model),
            },
            "student": {
                "class": type(self.student_model).__name__,
                "parameters": count_parameters(self.student_model),
            },
        }

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
        progress = self.progress or RunProgress(1)
        parameters = stage.trainable_parameters()
        self._only_train(stage, parameters)
        optimizer = self.optimizer_cls(parameter_groups(stage, settings), lr=settings.lr)
        total_steps = self.steps_per_epoch() * settings.epochs
        loop = _StageLoop(self, stage, settings, optimizer, list(parameters.values()), total_steps)
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

    def _train_epoch(self, loop: "_StageLoop", epoch: int, progress: RunProgress) -> None:
        seed = derived_seed(self.config.seed, loop.stage.name, f"epoch {epoch}")
        seed_generators(seed, self.device)
        loop.stage.start_epoch()
        loop.start_epoch()
        size = self.config.gradient_accumulation_steps
        for micro_batches in grouped(self.batches(epoch), size):
            loop.step(micro_batches)
            progress.advance()
            if loop.step_index % self.config.log_interval == 0:
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


class _StageLoop:
    """The optimizer steps of one stage."""

    def __init__(
        self,
        trainer: BaseDistillationTrainer,
        stage: Stage,
        settings: StageSettings,
        optimizer: Any,
        parameters: list[nn.Parameter],
        total_steps: int,
    ) -> None:
        self.config = trainer.config
        self.device = trainer.device
        self.stage = stage
        self.settings = settings
        self.optimizer = optimizer
        self.parameters = parameters
        self.total_steps = total_steps
        self.result = StageResult(stage.name)
        self.step_index = 0
        self._nonfinite_in_a_row = 0
        self._last_loss = self._last_norm = math.nan
        self._logged_at, self._logged_tokens = time.perf_counter(), 0
        self.start_epoch()

    def start_epoch(self) -> None:
        """Begin a new epoch mean."""
        self._loss_sum, self._positions = 0.0, 0

    def end_epoch(self, run: RunDirectory, epoch: int) -> None:
        """Close the epoch's mean and write it down."""
        mean = self._loss_sum / self._positions if self._positions else math.nan
        self.result.epoch_losses.append(mean)
        run.metrics.write("epoch", stage=self.stage.name, epoch=epoch, loss=mean)

    def step(self, micro_batches: list[Batch]) -> None:
        """One optimizer step: count, backward, clip, check, step."""
        seed = derived_seed(self.config.seed, self.stage.name, self.step_index)
        seed_generators(seed, self.device)
        factor = learning_rate_factor(
            self.step_index,
            self.total_steps,
            schedule=self.config.lr_schedule,
            warmup_ratio=self.config.warmup_ratio,
            min_lr_ratio=self.config.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor
        self.step_index += 1
        counts = [batch.count() for batch in micro_batches]
        if sum(counts) == 0:
            logger.warning("%s: no valid position. Skipping batch.", self.stage.name)
            self.result.skipped += 1
            return
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(micro_batches, counts)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skip(loss, norm)
            return
        self.optimizer.step()
        self._last_norm = norm
        self._count(loss, sum(counts))

    def log(self, run: RunDirectory, progress: RunProgress) -> None:
        """Write the newest loss and the speed since the last line."""
        now = time.perf_counter()
        tokens = self.result.tokens - self._logged_tokens
        speed = tokens / max(now - self._logged_at, 1e-9)
        self._logged_at, self._logged_tokens = now, self.result.tokens
        learning_rate = self.optimizer.param_groups[0]["lr"]
        run.metrics.write(
            "step",
            stage=self.stage.name,
            step=self.step_index,
            loss=self._last_loss,
            gradient_norm=self._last_norm,
            learning_rate=learning_rate,
            tokens_per_second=speed,
        )
        progress.show(self.step_index, self._last_loss, speed)

    def _backward(self, micro_batches: list[Batch], counts: list[int]) -> float:
        """Add up gradients; each mean loss weighs as its share of all valid positions."""
        total = 0.0
        for batch, count in zip(micro_batches, counts, strict=True):
            if count == 0:
                continue
            loss = self.stage.loss(batch) * (count / sum(counts))
            total += float(loss.detach())
            if not math.isfinite(total):
                break
            loss.backward()
        return total

    def _count(self, loss: float, positions: int) -> None:
        self._nonfinite_in_a_row = 0
        self._last_loss = loss
        self._loss_sum += loss * positions
        self._positions += positions
        self.result.steps += 1
        self.result.tokens += positions
        if self.result.steps == 1:
            self.result.first_loss = loss

    def _skip(self, loss: float, norm: float) -> None:
        what = f"Loss is {loss}" if not math.isfinite(loss) else f"Gradient norm is {norm}"
        logger.error(
            "Error: %s. Skipping batch. (%s, step %d)", what, self.stage.name, self.step_index
        )
        self.result.skipped += 1
        self._nonfinite_in_a_row += 1
        if self._nonfinite_in_a_row >= self.config.max_nonfinite_in_a_row:
            raise NonFiniteError(
                f"{what} at {self.stage.name}, step {self.step_index}, the"
                f" {self._nonfinite_in_a_row}th batch in a row; the last finite loss was"
                f" {self._last_loss:.4g}, at learning rate {self.settings.lr:g}.",
                "Lower the learning rate or max_grad_norm, or look for extreme values in the data.",
            )


def parameter_groups(stage: Stage, settings: StageSettings) -> list[dict[str, Any]]:
    """Optimizer groups: matrices get weight decay; norms, biases, gains and stitches get none."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in stage.trainable_parameters().items():
        plain = parameter.ndim < 2 or name.startswith("stitch.")
        (others if plain else decayed).append(parameter)
    groups = [(decayed, settings.weight_decay), (others, 0.0)]
    return [{"params": params, "weight_decay": wd} for params, wd in groups if params]


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of ``size`` batches; the last one may be shorter."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def derived_seed(seed: int, *parts: object) -> int:
    """A seed that is a pure function of the run's seed and of where the run is."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def count_parameters(model: nn.Module) -> int:
    """Stored parameters; a tensor shared by two modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
