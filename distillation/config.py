"""The settings of one run: validated at once, frozen afterwards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import TypedDict

from cleangpt.errors import UsageError
from cleangpt.runtime.precision import PRECISIONS
from cleangpt.schedules import SCHEDULES
from distillation.cache_plan import CACHES, STATE_DTYPES
from distillation.losses import DistillationLoss, LogitDistillationLoss

BLOCK_SCHEDULES = ("sequential", "parallel_local")
PerBlock = float | Sequence[float]
"""One number for all blocks, or one per student block."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What is taught and how the training loop runs.

    Args:
        distill_loss_type: Loss on hidden states, "mse" or "kl_div".
        distill_loss_temperature: Temperature of the hidden "kl_div", > 0.
        use_stitching_layers: Whether each block learns through its own stitching layer.
        stitching_layer_bias: Whether stitching layers have a bias.
        freeze_previous_blocks: Whether blocks before the one in training stay fixed. If not, they
            and the embeddings go on learning through it.
        schedule: "sequential" trains one block after the other; "parallel_local" trains all of them
            in one pass over the data, each on what the blocks before it make of a batch at that
            moment, with no gradient between blocks.
        logit_loss_type: Loss on logits, "kl_div", "mse" or "ce".
        logit_loss_temperature: Temperature of "kl_div" and "ce", > 0.
        logit_loss_weight: Factor on the logit loss, >= 0, relative to the hidden-state loss (whose
            factor is 1). It scales loss and gradient of the head phase.
        gradient_accumulation_steps: Micro-batches per optimizer step, >= 1.
        lr_schedule: "constant", "cosine" or "linear", per stage.
        warmup_ratio: Share of a stage's steps spent warming up, in [0, 1).
        min_lr_ratio: Final learning rate as a share of the peak, in [0, 1].
        max_nonfinite_in_a_row: Consecutive batches with a NaN or infinite loss or gradient that are
            skipped before the run stops, >= 1.
        first_hidden_position: Positions of a window before this one are left out of the
            hidden-state loss, >= 0. Pretrained models park huge activations on the first token (Sun
            et al. 2024, arXiv:2402.17762), which rule a raw "mse"; 1 leaves it out.
        activation_cache: Where frozen states are kept between epochs and blocks: "ram", "disk" (in
            the run's directory), "off" (nowhere: they are computed for every batch), or "auto": in
            memory if all fit there, else on disk if all fit there, else as many as memory takes.
            The same results in "fp32", bit for bit where all or none are kept.
        activation_cache_gb: What they may take, in units of 1e9 bytes, > 0; None is half of what is
            free.
        activation_dtype: What they are kept in: "fp32" is exact, "bf16" takes half the size and
            rounds them (2^-9 relative).
        keep_activations: Whether files of states stay in the run's directory when it ends, to look
            at or for another trainer that joins the open run; "auto" then means "disk". A later run
            there is refused, or deletes them with the rest (``overwrite``).
        precision: Of matrix products: "fp32", "bf16" (autocast; parameters, norms and losses stay
            float32), or "auto": bf16 on a GPU that has it, or where a short measurement finds it
            faster. The log and the manifest say which: results differ by rounding, so name one to
            compare machines.
        compile_blocks: Whether to compile each student block with ``torch.compile``: seconds per
            block to start with, then faster steps; needs a C++ compiler, or Triton on a GPU.
        log_interval: Optimizer steps between two logged lines, >= 1.
        hidden_state_pictures: Whether to draw student and teacher states per block and epoch.
        seed: Seed of everything random in the run.

    Raises:
        UsageError: Listing every setting that is out of range.
    """

    distill_loss_type: str = "mse"
    distill_loss_temperature: float = 1.0
    use_stitching_layers: bool = True
    stitching_layer_bias: bool = True
    freeze_previous_blocks: bool = True
    schedule: str = "sequential"
    logit_loss_type: str = "kl_div"
    logit_loss_temperature: float = 2.0
    logit_loss_weight: float = 1.0
    gradient_accumulation_steps: int = 1
    lr_schedule: str = "cosine"
    warmup_ratio: float = 0.05
    min_lr_ratio: float = 0.1
    max_nonfinite_in_a_row: int = 10
    first_hidden_position: int = 0
    activation_cache: str = "auto"
    activation_cache_gb: float | None = None
    activation_dtype: str = "fp32"
    keep_activations: bool = False
    precision: str = "auto"
    compile_blocks: bool = False
    log_interval: int = 50
    hidden_state_pictures: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        hidden, logit = DistillationLoss.LOSS_TYPES, LogitDistillationLoss.LOSS_TYPES
        rules = [
            ("distill_loss_type", self.distill_loss_type in hidden, f"one of {', '.join(hidden)}"),
            ("logit_loss_type", self.logit_loss_type in logit, f"one of {', '.join(logit)}"),
            ("activation_cache", self.activation_cache in CACHES, f"one of {', '.join(CACHES)}"),
            (
                "activation_cache_gb",
                self.activation_cache_gb is None or positive(self.activation_cache_gb),
                "above 0",
            ),
            (
                "activation_dtype",
                self.activation_dtype in STATE_DTYPES,
                f"one of {', '.join(STATE_DTYPES)}",
            ),
            ("schedule", self.schedule in BLOCK_SCHEDULES, f"one of {', '.join(BLOCK_SCHEDULES)}"),
            ("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            ("lr_schedule", self.lr_schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("distill_loss_temperature", positive(self.distill_loss_temperature), "above 0"),
            ("logit_loss_temperature", positive(self.logit_loss_temperature), "above 0"),
            ("logit_loss_weight", not_negative(self.logit_loss_weight), "0 or more"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "1 or more"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)"),
            ("first_hidden_position", self.first_hidden_position >= 0, "0 or more"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "in [0, 1]"),
            ("max_nonfinite_in_a_row", self.max_nonfinite_in_a_row >= 1, "1 or more"),
            ("log_interval", self.log_interval >= 1, "1 or more"),
        ]
        raise_problems([(n, getattr(self, n), rule) for n, holds, rule in rules if not holds])
        if self.keep_activations and self.activation_cache in ("ram", "off"):
            raise UsageError(
                "keep_activations=True keeps files of states, and"
                f" activation_cache={self.activation_cache!r} writes none.",
                "Choose --activation_cache disk or auto, or leave --keep_activations out.",
            )
        if self.schedule == "parallel_local" and not self.freeze_previous_blocks:
            raise UsageError(
                "schedule='parallel_local' lets no gradient cross a block, and"
                " freeze_previous_blocks=False asks for one.",
                "Choose --schedule sequential, or keep --freeze_previous_blocks.",
            )


class LoopOptions(TypedDict, total=False):
    """The keyword-only settings all trainers take, described in :class:`DistillationConfig`."""

    gradient_accumulation_steps: int
    lr_schedule: str
    warmup_ratio: float
    min_lr_ratio: float
    max_nonfinite_in_a_row: int
    first_hidden_position: int
    activation_cache: str
    activation_cache_gb: float | None
    activation_dtype: str
    keep_activations: bool
    schedule: str
    precision: str
    compile_blocks: bool
    hidden_state_pictures: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """How long and how fast one stage trains.

    Args:
        epochs: Passes over the data, >= 0; 0 leaves the stage as it starts.
        lr: Peak learning rate, > 0.
        weight_decay: Weight decay of matrices, >= 0; norms, biases, gains and stitches get none.
        max_grad_norm: Clipping threshold of the global gradient norm, > 0.

    Raises:
        UsageError: Listing every setting that is out of range.
    """

    epochs: int
    lr: float
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        whole = isinstance(self.epochs, int) and self.epochs >= 0
        rules = [
            ("epochs", whole, "a whole number, 0 or more"),
            ("lr", positive(self.lr), "above 0"),
            ("weight_decay", not_negative(self.weight_decay), "0 or more"),
            ("max_grad_norm", positive(self.max_grad_norm), "above 0"),
        ]
        raise_problems([(n, getattr(self, n), rule) for n, holds, rule in rules if not holds])


def block_settings(
    num_blocks: int,
    *,
    epochs_per_block: int | Sequence[int],
    lr_per_block: PerBlock,
    wd_per_block: PerBlock,
    max_grad_norm_per_block: PerBlock,
) -> list[StageSettings]:
    """Spread each setting, a number or a list of one per block, over the student's blocks.

    Raises:
        UsageError: If a list has not exactly one entry per block, or a value is out of range.
    """
    columns = [
        spread("epochs_per_block", epochs_per_block, num_blocks),
        spread("lr_per_block", lr_per_block, num_blocks),
        spread("wd_per_block", wd_per_block, num_blocks),
        spread("max_grad_norm_per_block", max_grad_norm_per_block, num_blocks),
    ]
    return [
        StageSettings(epochs=epochs, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        for epochs, lr, weight_decay, max_grad_norm in zip(*columns, strict=True)
    ]


def spread(name: str, value: object, num_blocks: int) -> list[object]:
    """Return one value per block.

    Raises:
        UsageError: If ``value`` is a list of another length.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * num_blocks
    if len(value) != num_blocks:
        raise UsageError(
            f"{name} has {len(value)} entries, and the student has {num_blocks} blocks.",
            f"Pass one number for all blocks, or a list of exactly {num_blocks}.",
        )
    return list(value)


def positive(value: float) -> bool:
    """Whether ``value`` is a finite number above 0."""
    return math.isfinite(value) and value > 0


def not_negative(value: float) -> bool:
    """Whether ``value`` is a finite number, 0 or more."""
    return math.isfinite(value) and value >= 0


def raise_problems(problems: list[tuple[str, object, str]]) -> None:
    """Raise one error that lists all problems, if there are any.

    Raises:
        UsageError: If ``problems`` is not empty.
    """
    if problems:
        found = "; ".join(f"{name}={value!r} must be {rule}" for name, value, rule in problems)
        names = ", ".join(name for name, _, _ in problems)
        raise UsageError(f"Settings out of range: {found}.", f"Correct {names}.")
