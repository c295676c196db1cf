"""The optimizer steps of one stage.

Per step: count valid positions over the micro-batches, weigh each loss by its share of the count,
backward, sum over processes, clip, check that loss and norm are finite, and only then step. So
accumulation, padding, ragged batches and the number of processes change neither loss nor gradient.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cleangpt.errors import NonFiniteError
from cleangpt.run_directory import RunDirectory
from cleangpt.runtime.device import seed_generators
from cleangpt.runtime.precision import Precision
from cleangpt.runtime.ranks import Ranks
from cleangpt.schedules import learning_rate_factor
from distillation.batch import Batch
from distillation.config import DistillationConfig, StageSettings
from distillation.optimizer_state import load_optimizer, optimizer_tensors
from distillation.stages import Stage
from distillation.trainers.loss_watch import LossWatch

logger = logging.getLogger(__name__)

COUNTERS = (
    *("step_index", "has_stopped", "_nonfinite_in_a_row", "_last_loss", "_last_norm"),
    *("_loss_sum", "_positions"),
)
"""What a loop counts, to be saved with it."""
HAVE_FUSED_FORMS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


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
        seconds: Wall time; of stages that trained together, an equal share.
        summary: What the stage itself measured.
        validation_losses: Mean loss on held-out data: before the first epoch, then after each;
            empty without such data.
        kept_epochs: After how many epochs the weights had their lowest validation loss, and were
            kept; 0 is the start, None that there was no such choice.
    """

    name: str
    epoch_losses: list[float] = field(default_factory=list)
    first_loss: float = math.nan
    steps: int = 0
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0
    summary: dict[str, float] = field(default_factory=dict)
    validation_losses: list[float] = field(default_factory=list)
    kept_epochs: int | None = None

    @property
    def last_loss(self) -> float:
        """Mean loss of the last epoch; NaN if nothing was trained."""
        return self.epoch_losses[-1] if self.epoch_losses else math.nan

    @property
    def best_loss(self) -> float:
        """Lowest epoch mean; NaN if nothing was trained."""
        finite = [loss for loss in self.epoch_losses if math.isfinite(loss)]
        return min(finite, default=math.nan)

    def row(self) -> dict[str, Any]:
        """What tables, logs and the manifest say of every stage."""
        return {
            "stage": self.name,
            "first_loss": self.first_loss,
            "best_loss": self.best_loss,
            "last_loss": self.last_loss,
            "validation_losses": self.validation_losses,
            "kept_epochs": self.kept_epochs,
            "steps": self.steps,
            "skipped": self.skipped,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


class StageLoop:
    """The optimizer steps of one stage.

    On the CPU each step is checked before it is taken. On an accelerator, asking for a loss would
    make the host wait for every step, so the check stays on the device (the fused optimizers skip a
    step whose ``found_inf`` is set) and the numbers are gathered when something is logged.
    """

    def __init__(
        self,
        stage: Stage,
        config: DistillationConfig,
        settings: StageSettings,
        optimizer: Any,
        total_steps: int,
        precision: Precision,
        ranks: Ranks,
    ) -> None:
        self.stage = stage
        self.config = config
        self.settings = settings
        self.optimizer = optimizer
        self.parameters = list(stage.trainable_parameters().values())
        self.device = self.parameters[0].device
        self.total_steps = total_steps
        self.precision = precision
        self.ranks = ranks
        self.result = StageResult(stage.name)
        self.step_index = 0
        self.has_stopped = False
        self._best_weights: list[Tensor] = []
        self._deferred = self.device.type != "cpu" and skips_nonfinite_steps(optimizer)
        self._pending: list[tuple[int, Tensor, Tensor, int]] = []
        self._nonfinite_in_a_row = 0
        self._watch = LossWatch()
        self._last_loss = self._last_norm = math.nan
        self._logged_at, self._logged_tokens = time.perf_counter(), 0
        self.start_epoch()

    def start_epoch(self) -> None:
        """Begin a new epoch mean."""
        self._loss_sum, self._positions = 0.0, 0

    def end_epoch(self, run: RunDirectory, epoch: int) -> None:
        """Close the epoch's mean and write it down."""
        self._gather()
        mean = self._loss_sum / self._positions if self._positions else math.nan
        self.result.epoch_losses.append(mean)
        run.metrics.write("epoch", stage=self.stage.name, epoch=epoch, loss=mean)

    def keep_best(self, validation_loss: float, run: RunDirectory) -> None:
        """Remember the weights with the lowest validation loss; stop when it no longer falls."""
        losses, kept = self.result.validation_losses, self.result.kept_epochs
        done = len(losses)
        losses.append(validation_loss)
        run.metrics.write(
            "validation", stage=self.stage.name, epochs_done=done, loss=validation_loss
        )
        is_best = kept is None or validation_loss < losses[kept]
        if is_best and math.isfinite(validation_loss):
            self.result.kept_epochs = done
            self._best_weights = [p.detach().clone() for p in self.parameters]
            return
        patience = self.config.early_stop_patience
        if kept is not None and patience and done - kept >= patience:
            self.has_stopped = True
            logger.info(
                "%s stops after %d epochs: no better validation loss since %d.",
                *(self.stage.name, done, kept),
            )

    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the weights with the lowest validation loss, if they are not the last."""
        for parameter, best in zip(self.parameters, self._best_weights, strict=False):
            parameter.copy_(best)
        self._best_weights = []

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on, except for the modules' weights."""
        self._gather()
        tensors, values = optimizer_tensors(self.optimizer)
        named = {f"optimizer/{name}": tensor for name, tensor in tensors.items()}
        named |= {f"best/{index}": tensor for index, tensor in enumerate(self._best_weights)}
        measured = self.stage.measured(self.ranks)
        named |= {f"measured/{name}": tensor for name, tensor in measured.items()}
        counters = {name: getattr(self, name) for name in COUNTERS}
        return named, {"optimizer": values, "counters": counters, "result": asdict(self.result)}

    def go_on(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up what :meth:`saved` returned."""
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "best": {}, "measured": {}}
        for name, tensor in tensors.items():
            part, key = name.split("/", 1)
            parts[part][key] = tensor.to(self.device)
        load_optimizer(self.optimizer, parts["optimizer"], values["optimizer"])
        best = parts["best"]
        self._best_weights = [best[str(index)] for index in range(len(best))]
        self.stage.go_on_measuring(parts["measured"], self.ranks)
        for name, value in values["counters"].items():
            setattr(self, name, value)
        self.result = StageResult(**values["result"])
        self._logged_tokens = self.result.tokens

    def step(self, micro_batches: list[Batch], shares: list[Batch]) -> None:
        """One optimizer step: count, backward, sum over processes, clip, check, step.

        Args:
            micro_batches: What all processes together compute.
            shares: What this process computes of each; may be no row.
        """
        self.stage.progress = self.step_index / max(1, self.total_steps)
        place = (self.stage.name, self.step_index, *([self.ranks.index] * (not self.ranks.is_main)))
        seed = derived_seed(self.config.seed, *place)
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
        counts = [self.stage.count(batch) for batch in micro_batches]
        if sum(counts) == 0:
            where = (self.stage.name, self.step_index)
            logger.warning("%s, step %d: no valid position. Skipping batch.", *where)
            self.result.skipped += 1
            return
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(shares, sum(counts))
        self.ranks.sum_gradients(self.parameters, loss)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self._pending.append((self.step_index, loss, norm, sum(counts)))
        if self._deferred:
            self.optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
            self.optimizer.step()
        elif self._gather():
            self.optimizer.step()

    def log(self, run: RunDirectory) -> tuple[float, float]:
        """Write down the newest loss and the tokens per second since the last line; return both."""
        self._gather()
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
        return self._last_loss, speed

    def _backward(self, shares: list[Batch], positions: int) -> Tensor:
        """Add up gradients; each mean loss weighs as its share of all valid positions."""
        total = torch.zeros((), device=self.device)
        for batch in shares:
            count = self.stage.count(batch)
            with self.precision.autocast(self.device):
                if not count:
                    self.stage.stand_by(batch)
                    continue
                loss = self.stage.loss(batch) * (count / positions)
            loss.backward()
            total = total + loss.detach()
        return total

    def _gather(self) -> bool:
        """Read the steps not yet read; return whether the last one was finite.

        Raises:
            NonFiniteError: After ``max_nonfinite_in_a_row`` in a row.
        """
        finite = True
        for step, loss_tensor, norm_tensor, positions in self._pending:
            loss, norm = float(loss_tensor), float(norm_tensor)
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                self._count(loss, norm, positions)
                said = self._watch.seen(loss)
                if said:
                    logger.warning("%s, step %d: %s", self.stage.name, step, said)
            else:
                self._skip(step, loss, norm)
        self._pending.clear()
        return finite

    def _count(self, loss: float, norm: float, positions: int) -> None:
        self._nonfinite_in_a_row = 0
        self._last_loss, self._last_norm = loss, norm
        self._loss_sum += loss * positions
        self._positions += positions
        self.result.steps += 1
        self.result.tokens += positions
        if self.result.steps == 1:
            self.result.first_loss = loss

    def _skip(self, step: int, loss: float, norm: float) -> None:
        what = f"Loss is {loss}" if not math.isfinite(loss) else f"Gradient norm is {norm}"
        logger.error("Error: %s. Skipping batch. (%s, step %d)", what, self.stage.name, step)
        self.result.skipped += 1
        self._nonfinite_in_a_row += 1
        if self._nonfinite_in_a_row >= self.config.max_nonfinite_in_a_row:
            self._pending.clear()
            raise NonFiniteError(
                f"{what} at {self.stage.name}, step {step}:"
                f" {self._nonfinite_in_a_row} batches in a row; the last finite loss was"
                f" {self._last_loss:.4g}, the learning rate is now"
                f" {self.optimizer.param_groups[0]['lr']:.3g}.",
                "Lower the learning rate (lr_per_block, lm_head_lr) or the clipping threshold"
                " (max_grad_norm_per_block, lm_head_max_grad_norm).",
            )


def build_optimizer(
    optimizer_cls: Callable[..., Any], stage: Stage, settings: StageSettings
) -> Any:
    """The stage's optimizer; PyTorch's own in their fused form, which is several times faster."""
    groups = parameter_groups(stage, settings)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = optimizer_cls in HAVE_FUSED_FORMS and devices <= {"cpu", "cuda"}
    return optimizer_cls(groups, lr=settings.lr, **({"fused": True} if fused else {}))


def skips_nonfinite_steps(optimizer: Any) -> bool:
    """Whether the optimizer leaves everything as it is when its ``found_inf`` is set."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def parameter_groups(stage: Stage, settings: StageSettings) -> list[dict[str, Any]]:
    """Optimizer groups: matrices get weight decay; norms, biases, gains and stitches get none."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in stage.trainable_parameters().items():
        plain = parameter.ndim < 2 or name.startswith(("stitch.", "stitches."))
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
