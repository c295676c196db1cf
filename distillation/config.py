"""The settings of one run: validated at once, frozen afterwards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import TypedDict

from cleangpt.errors import UsageError
from cleangpt.runtime.precision import PRECISIONS
from cleangpt.schedules import SCHEDULES
from distillation.cache_plan import CACHES, STATE_DTYPES
from distillation.layer_map import LAYER_MAPS, LayerMap
from distillation.losses import DistillationLoss, LogitDistillationLoss

BLOCK_SCHEDULES = ("sequential", "parallel_local", "decoupled")
BLOCK_INPUTS = ("student", "teacher", "mixed")
STUDENT_STARTS = ("none", "pca", "slice", "layers")
STITCH_STARTS = ("random", "least_squares")
HEAD_STARTS = ("least_squares", "fold")
HEAD_TYINGS = ("untie", "tie")
PerBlock = float | Sequence[float]
"""One number for all blocks, or one per student block."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What is taught and how the training loop runs.

    Args:
        distill_loss_type: Loss on hidden states: a name that
            :class:`~distillation.losses.DistillationLoss` knows.
        distill_loss_temperature: Temperature of the hidden "kl_div", > 0.
        use_stitching_layers: Whether each block learns through its own stitching layer.
        stitching_layer_bias: Whether stitching layers have a bias.
        stitch_equal_widths: Whether a student that starts from the teacher, and is as wide, has
            stitches too. Without them its states are compared as the teacher's own.
        freeze_previous_blocks: Whether blocks before the one in training stay fixed. If not, they
            and the embeddings go on learning through it.
        schedule: "sequential" trains one block after the other; "parallel_local" trains all of them
            in one pass over the data, each on what the blocks before it make of a batch at that
            moment, with no gradient between blocks; "decoupled", which needs the teacher's inputs,
            gives each process of the run blocks of its own, with all the data and no gradient to
            exchange. The results are those of one process, bit for bit.
        block_inputs: What enters a block while it learns: "student" (what the blocks before it
            make), "teacher" (the teacher's states, in one basis that all stitches share and that
            does not learn; blocks are independent then), or "mixed" (the teacher's at first, the
            student's at the end); see :mod:`distillation.block_inputs`.
        layer_map: Which teacher block each student block learns from: "uniform", "first", "last",
            or their indices; see :func:`~distillation.layer_map.choose_layer_map`.
        blocks: The student blocks that learn, by index; the others stay as they are. None is all.
        logit_loss_type: Loss on logits, "kl_div", "mse" or "ce".
        logit_loss_temperature: Temperature of "kl_div" and "ce", > 0.
        logit_loss_weight: Factor on the logit loss, >= 0, relative to the hidden-state loss. It
            scales loss and gradient of the head phase, and the logits' part of the polish.
        init_from_teacher: What the student's weights start from, before anything is trained:
            "none" (as built), "pca" (the teacher's, seen through the main directions of its hidden
            states), "slice" (the teacher's strongest channels, heads and neurons) or "layers"
            (whole layers of a teacher of the same width).
        stitch_start: What each stitch starts from when its block's turn comes: "random" (Xavier;
            the identity at equal widths) or "least_squares" (the best read-out of the untrained
            block).
        train_stitches: Whether stitches learn; if not, they stay as they start, and the student
            alone has to make its states readable through them.
        head_start: How a head that cannot be copied starts from the teacher's: "least_squares", or
            "fold" (the teacher's head through the last block's trained stitch, exactly; needs a
            student with ``final_norm="folded"``).
        head_tying: "untie" gives the head a weight of its own; "tie" leaves it the embeddings,
            which only the polish trains.
        polish_hidden_weight: Factor on the mean hidden-state loss of all blocks during the polish,
            >= 0; 0 leaves hidden states alone.
        polish_hidden_fade: Whether that factor falls linearly to zero over the polish.
        audit_tokens: Tokens through the teacher that its hidden states are measured on, >= 0. 0
            skips the audit where nothing needs it.
        early_stop_patience: Epochs without a better validation loss after which a block or the head
            stops learning, >= 0; 0 never stops. Needs a validation_dataloader.
        overfit_gate: Whether every stage must first show, on one small batch and a copy of its
            weights, that it can learn; else the run stops before it has cost much.
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
        compile_blocks: Whether to compile each student block, and on a GPU the divergence of the
            logits into one kernel, with ``torch.compile``: seconds per block to start with, then
            faster steps; needs a C++ compiler, or Triton on a GPU.
        checkpoint_minutes: Minutes between two checkpoints inside a stage, >= 0; 0 makes none but
            those at the ends of stages, where the one before is older than ten seconds. All are
            made by ``DistillationTrainer``, none by the trainer of one stage.
        checkpoint_steps: Optimizer steps between two more, >= 0; 0 makes none.
        log_interval: Optimizer steps between two logged lines, >= 1.
        hidden_state_pictures: Whether to draw student and teacher states per block and epoch.
        track: Trackers that follow the run, of "tensorboard", "wandb" and "trackio".
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
    block_inputs: str = "student"
    layer_map: LayerMap = "uniform"
    blocks: Sequence[int] | None = None
    logit_loss_type: str = "kl_div"
    logit_loss_temperature: float = 2.0
    logit_loss_weight: float = 1.0
    init_from_teacher: str = "none"
    stitch_equal_widths: bool = True
    stitch_start: str = "random"
    train_stitches: bool = True
    head_start: str = "least_squares"
    head_tying: str = "untie"
    polish_hidden_weight: float = 0.0
    polish_hidden_fade: bool = True
    audit_tokens: int = 8192
    early_stop_patience: int = 0
    overfit_gate: bool = False
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
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int = 0
    log_interval: int = 50
    hidden_state_pictures: bool = False
    track: Sequence[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        choices = {
            "distill_loss_type": DistillationLoss.LOSS_TYPES,
            "logit_loss_type": LogitDistillationLoss.LOSS_TYPES,
            "init_from_teacher": STUDENT_STARTS,
            "stitch_start": STITCH_STARTS,
            "head_start": HEAD_STARTS,
            "head_tying": HEAD_TYINGS,
            "activation_cache": CACHES,
            "activation_dtype": tuple(STATE_DTYPES),
            "schedule": BLOCK_SCHEDULES,
            "block_inputs": BLOCK_INPUTS,
            "precision": PRECISIONS,
            "lr_schedule": SCHEDULES,
        }
        rules = [
            (name, getattr(self, name) in known, f"one of {', '.join(known)}")
            for name, known in choices.items()
        ]
        rules += [
            (
                "activation_cache_gb",
                self.activation_cache_gb is None or positive(self.activation_cache_gb),
                "above 0",
            ),
            (
                "layer_map",
                self.layer_map in LAYER_MAPS if isinstance(self.layer_map, str) else True,
                f"one of {', '.join(LAYER_MAPS)}, or the teacher block of each student block",
            ),
            ("distill_loss_temperature", positive(self.distill_loss_temperature), "above 0"),
            ("logit_loss_temperature", positive(self.logit_loss_temperature), "above 0"),
            ("logit_loss_weight", not_negative(self.logit_loss_weight), "0 or more"),
            ("polish_hidden_weight", not_negative(self.polish_hidden_weight), "0 or more"),
            ("audit_tokens", self.audit_tokens >= 0, "0 or more"),
            ("early_stop_patience", self.early_stop_patience >= 0, "0 or more"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "1 or more"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)"),
            ("first_hidden_position", self.first_hidden_position >= 0, "0 or more"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "in [0, 1]"),
            ("max_nonfinite_in_a_row", self.max_nonfinite_in_a_row >= 1, "1 or more"),
            ("checkpoint_minutes", not_negative(self.checkpoint_minutes), "0 or more"),
            ("checkpoint_steps", self.checkpoint_steps >= 0, "0 or more"),
            ("log_interval", self.log_interval >= 1, "1 or more"),
        ]
        raise_problems([(n, getattr(self, n), rule) for n, holds, rule in rules if not holds])
        if self.keep_activations and self.activation_cache in ("ram", "off"):
            raise UsageError(
                "keep_activations=True keeps files of states, and"
                f" activation_cache={self.activation_cache!r} writes none.",
                "Choose --activation_cache disk or auto, or leave --keep_activations out.",
            )
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Refuse orders and inputs of blocks that cannot go together."""
        schedule, inputs = self.schedule, self.block_inputs
        if not self.freeze_previous_blocks and (schedule, inputs) != ("sequential", "student"):
            what = f"schedule={schedule!r}, block_inputs={inputs!r}"
            raise UsageError(
                f"{what} lets no gradient cross a block, and freeze_previous_blocks=False asks for"
                " one.",
                "Choose --schedule sequential and --block_inputs student, or keep"
                " --freeze_previous_blocks.",
            )
        if schedule == "decoupled" and inputs != "teacher":
            raise UsageError(
                f"schedule='decoupled' lets no block wait for another, and block_inputs={inputs!r}"
                " needs the blocks before it.",
                "Choose --block_inputs teacher, or --schedule sequential.",
            )
        if schedule == "parallel_local" and inputs == "mixed":
            raise UsageError(
                "block_inputs='mixed' needs what finished blocks make, and"
                " schedule='parallel_local' trains all at once.",
                "Choose --schedule sequential, or --block_inputs student or teacher.",
            )


class LoopOptions(TypedDict, total=False):
    """The keyword-only settings all trainers take, described in :class:`DistillationConfig`."""

    init_from_teacher: str
    stitch_equal_widths: bool
    stitch_start: str
    train_stitches: bool
    head_start: str
    head_tying: str
    polish_hidden_weight: float
    polish_hidden_fade: bool
    audit_tokens: int
    early_stop_patience: int
    overfit_gate: bool
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
    block_inputs: str
    layer_map: LayerMap
    blocks: Sequence[int] | None
    precision: str
    compile_blocks: bool
    checkpoint_minutes: float
    checkpoint_steps: int
    hidden_state_pictures: bool
    track: Sequence[str]
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


def by_stage(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The arguments of ``DistillationTrainer.train`` that blocks, head and polish get."""
    chosen = [
        {name: value for name, value in arguments.items() if wanted(name)}
        for wanted in (
            lambda name: name.endswith("_per_block"),
            lambda name: name.startswith("lm_head_"),
            lambda name: name.startswith("polish_"),
        )
    ]
    return chosen[0], chosen[1], chosen[2]


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
