"""One run of the quality study: an arm, a student, a budget and a seed give a test loss.

An arm spends its budget of training operations on stages. What is charged is what the library
executes: the teacher's blocks once per distinct token (their states are kept, for every arm), its
head at every step, and forward and backward of whatever part of the student is in training. Wall
time is written down beside it.
"""

import logging
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality_students import built
from cleangpt.blocks import BlockStack
from distillation import DistillationTrainer
from distillation.batch import Batch
from distillation.evaluation.speed import measure_speed
from distillation.logit_stages import PolishStage
from distillation.losses.divergence import tempered_kl
from distillation.plan import block_flops
from distillation.trainers import PolishDistillationTrainer

logger = logging.getLogger(__name__)

HEAD_FIT_TOKENS = 32_768
WARM_UP_STEPS = 16
DECODED = 32


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How a budget is spent.

    Args:
        name: As in the tables.
        init: ``init_from_teacher`` of the run.
        blocks: Share of the budget for the steps of the blocks. The states they read are charged
            besides: later stages read them again.
        blocks_at_most: Share that those steps may cost with the states they read.
        head: Share of what the blocks leave for the head phase, with the states that it is the
            first to read; the closed-form start alone is 0.
        head_phase: Whether there is a head phase at all.
        next_token: Whether the last stage learns the text itself, without a teacher.
        validated: Whether each stage keeps its best weights by held-out text, as the command does;
            what that costs is not charged.
        untrained_start: Whether all but the polish has an untrained teacher of the same shape.
        options: More keyword arguments of the trainer.
        training: More keyword arguments of its ``train``.
    """

    name: str
    init: str = "none"
    blocks: float = 0.0
    blocks_at_most: float = 1.0
    head: float = 0.0
    head_phase: bool = False
    next_token: bool = False
    validated: bool = False
    untrained_start: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


class StepLoader:
    """Exactly ``steps`` batches per pass: shuffled epochs of the windows, one after the other."""

    def __init__(self, windows: Tensor, batch_size: int, steps: int, seed: int) -> None:
        self.windows, self.batch_size, self.steps, self.seed = windows, batch_size, steps, seed
        self.dataset = SimpleNamespace(num_tokens=windows.numel(), block_size=windows.shape[1])
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per pass."""
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches; a function of the seed and the epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + self.epoch)
        order: list[int] = []
        for _ in range(self.steps):
            while len(order) < self.batch_size:
                order += torch.randperm(len(self.windows), generator=generator).tolist()
            rows, order = order[: self.batch_size], order[self.batch_size :]
            ids = self.windows[rows]
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class NextTokenStage(PolishStage):
    """Ordinary language modelling: the student predicts the text."""

    def loss(self, batch: Batch) -> Tensor:
        """The mean cross-entropy of the next token, in nats."""
        logits = self.student.logits(batch.input_ids)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.input_ids[:, 1:].flatten())


class NextTokenTrainer(PolishDistillationTrainer):
    """The polish without a teacher."""

    def stage(self, activations: Any) -> PolishStage:
        """The stage that learns the text itself."""
        return NextTokenStage(activations, self.logit_loss_fn, loss_weight=1.0)


@dataclass(frozen=True)
class Costs:
    """Operations per token of the parts of a run."""

    teacher: BlockStack
    student: BlockStack
    seq_len: int

    @cached_property
    def teacher_blocks(self) -> float:
        """All teacher blocks, forward."""
        return sum(
            block_flops(self.teacher, i, self.seq_len) for i in range(self.teacher.num_blocks)
        )

    @cached_property
    def student_blocks(self) -> float:
        """All student blocks, forward."""
        return sum(
            block_flops(self.student, i, self.seq_len) for i in range(self.student.num_blocks)
        )

    @property
    def student_head(self) -> float:
        """The student's head, forward."""
        return 2.0 * self.student.vocab_size * self.student.hidden_size

    @property
    def teacher_head(self) -> float:
        """The teacher's head, forward."""
        return 2.0 * self.teacher.vocab_size * self.teacher.hidden_size

    def blocks_step(self) -> float:
        """One step of every block in turn, stitches included."""
        return 3 * (self.student_blocks + self.stitches)

    def head_step(self) -> float:
        """One step of the head phase."""
        return 3 * self.student_head + self.teacher_head

    @property
    def stitches(self) -> float:
        """The stitches of all blocks, forward."""
        width = 2.0 * self.student.hidden_size * self.teacher.hidden_size
        return self.student.num_blocks * width

    def polish_step(self, *, next_token: bool = False, hidden: bool = False) -> float:
        """One step of the whole student."""
        own = 3 * (self.student_blocks + self.student_head + hidden * self.stitches)
        return own if next_token else own + self.teacher_head


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of each stage (blocks: of every block)."""

    blocks: int
    head: int
    polish: int
    flops: float


def share_out(arm: Arm, costs: Costs, budget: float, distinct: int, batch_tokens: int) -> Steps:
    """Turn a budget of operations into steps of the arm's stages."""
    fitted = HEAD_FIT_TOKENS if arm.head_phase else 0

    def read(blocks: int, head: int) -> int:
        # Every stage sees the same windows first, so the teacher's blocks run once for each.
        return min(distinct, max(blocks * batch_tokens, head * batch_tokens, fitted))

    def spend(blocks: int, head: int) -> float:
        steps = batch_tokens * (blocks * costs.blocks_step() + head * costs.head_step())
        own = min(distinct, blocks * batch_tokens) + min(distinct, max(fitted, head * batch_tokens))
        return steps + read(blocks, head) * costs.teacher_blocks + own * costs.student_blocks

    blocks = int(arm.blocks * budget / (costs.blocks_step() * batch_tokens))
    blocks = _most(lambda n: spend(n, 0) <= arm.blocks_at_most * budget, blocks)
    left = budget - spend(blocks, 0)
    head = int(arm.head * budget / (costs.head_step() * batch_tokens))
    head = _most(lambda n: spend(blocks, n) <= budget - (1 - arm.head) * left, head)
    spent, known = spend(blocks, head), read(blocks, head)
    hidden = arm.options.get("polish_hidden_weight", 0.0) > 0
    step = costs.polish_step(next_token=arm.next_token, hidden=hidden) * batch_tokens
    if arm.untrained_start:
        known = 0  # the polish has another teacher
    polish = 0
    while arm.blocks < 1 and arm.head < 1:
        fresh = 0
        if not arm.next_token:
            seen = max(known, polish * batch_tokens)
            fresh = max(0, min(distinct, (polish + 1) * batch_tokens) - seen)
        cost = step + fresh * costs.teacher_blocks
        if spent + cost > budget:
            break
        spent += cost
        polish += 1
    return Steps(blocks, head, polish, spent)


def _most(fits: Callable[[int], bool], at_most: int) -> int:
    """The largest count up to a bound that fits; 0 where none does."""
    return bisect_left(range(1, at_most + 1), True, key=lambda count: not fits(count))


def run_arm(
    arm: Arm,
    *,
    teacher: Any,
    windows: Tensor,
    judges: Sequence[Callable[[Any], dict[str, Any]]],
    kind: str,
    shape: dict[str, Any],
    budget: float,
    seed: int,
    batch_size: int = 8,
    held_out: Tensor | None = None,
) -> dict[str, Any]:
    """Train one student on windows, [windows, seq], and judge it; the record says how.

    A validated arm keeps its best weights by the windows ``held_out``. Every judge is given the
    student, and adds what it returns.
    """
    torch.manual_seed(seed)
    student = built(kind, shape, teacher)
    costs = Costs(BlockStack(teacher), BlockStack(student), windows.shape[1])
    steps = share_out(arm, costs, budget, windows.numel(), batch_size * windows.shape[1])
    started_at = time.perf_counter()
    loaders = stage_loaders(windows, steps, seed, batch_size)
    validation = None
    if arm.validated and held_out is not None:
        validation = StepLoader(held_out, batch_size, len(held_out) // batch_size, seed)
    train_seconds = 0.0
    for stages, teacher_of_stages, arguments in calls_of(arm, steps, teacher, seed):
        with tempfile.TemporaryDirectory() as folder:
            models = teacher_of_stages, student
            trainer = _trainer(stages, models, loaders, validation, seed, Path(folder))
            train_seconds += trainer.train(**arguments)["seconds"]
    seconds = time.perf_counter() - started_at
    judged = {name: value for judge in judges for name, value in judge(student).items()}
    return {
        "arm": arm.name,
        "kind": kind,
        "shape": shape,
        "budget": budget,
        "seed": seed,
        "parameters": sum(p.numel() for p in student.parameters()),
        "steps": asdict(steps),
        "seconds": round(seconds, 2),
        "train_seconds": round(train_seconds, 2),
        "tokens_per_second": decoding_rates(teacher, student),
        **judged,
    }


def calls_of(
    arm: Arm, steps: Steps, teacher: Any, seed: int
) -> list[tuple[Arm, Any, dict[str, Any]]]:
    """The calls of ``train`` that an arm is made of: what starts, from whom it learns, and how."""
    epochs: dict[str, Any] = {
        "epochs_per_block": min(1, steps.blocks),
        "train_lm_head": arm.head_phase,
        "lm_head_epochs": min(1, steps.head),
        "polish_epochs": min(1, steps.polish),
        "lr_per_block": 1e-3,
        **arm.training,
    }
    if not arm.untrained_start:
        return [(arm, teacher, epochs)]
    alone = {**epochs, "epochs_per_block": 0, "train_lm_head": False}
    return [
        (arm, untrained_like(teacher, seed), {**epochs, "polish_epochs": 0}),
        (replace(arm, init="none"), teacher, alone),
    ]


def decoding_rates(teacher: Any, student: Any) -> dict[str, float | None]:
    """Tokens per second of both models, decoding in turns with their caches; None without room."""
    stacks = BlockStack(teacher), BlockStack(student)
    ids = torch.zeros(16, dtype=torch.long).tolist()
    rates = measure_speed(stacks, ids, len(ids) + DECODED, budget_seconds=2.0)
    names = ("teacher", "student")
    return {n: rate["decode_tokens_per_second"] for n, rate in zip(names, rates, strict=True)}


def untrained_like(teacher: Any, seed: int) -> Any:
    """A model of the teacher's shape with random weights."""
    torch.manual_seed(seed)
    return type(teacher)(teacher.config).eval()


def stage_loaders(windows: Tensor, steps: Steps, seed: int, batch_size: int) -> list[StepLoader]:
    """The batches of blocks, head and polish: as many as charged, some to fit on where none is."""
    counts = [count or WARM_UP_STEPS for count in (steps.blocks, steps.head, steps.polish)]
    if not steps.head:  # the closed-form start reads the data
        counts[1] = HEAD_FIT_TOKENS // (batch_size * windows.shape[1])
    return [StepLoader(windows, batch_size, count, seed) for count in counts]


def _trainer(
    arm: Arm,
    models: tuple[Any, Any],
    loaders: Sequence[StepLoader],
    validation: StepLoader | None,
    seed: int,
    folder: Path,
) -> DistillationTrainer:
    options: dict[str, Any] = {
        "logit_loss_temperature": 1.0,
        "init_from_teacher": arm.init,
        "precision": "fp32",
        "seed": seed,
        "validation_dataloader": validation,
        "output_dir": folder / "run",
        **arm.options,
    }
    trainer = DistillationTrainer(*models, None, loaders[0], **options)
    if arm.next_token:
        trainer.polish_trainer = NextTokenTrainer(*models, None, loaders[2], **options)
    trainer.head_trainer.train_dataloader = loaders[1]
    trainer.polish_trainer.train_dataloader = loaders[2]
    return trainer


class Judge:
    """Held-out loss, KL from the teacher and agreement; the teacher's answers are kept.

    Args:
        teacher: Judged against.
        windows: Token ids, [windows, seq].
        batch_size: Windows at a time.
        keep: Whether the teacher's logits are kept, [positions, vocab] of all windows.
    """

    def __init__(
        self, teacher: Any, windows: Tensor, batch_size: int = 16, *, keep: bool = True
    ) -> None:
        self.teacher = teacher.eval()
        self.batches = windows.split(batch_size)
        self.kept = [self._answer(ids) for ids in self.batches] if keep else None

    @torch.no_grad()
    def __call__(self, student: Any) -> dict[str, Any]:
        """Return means over tokens, in nats, and the loss of each window."""
        student.eval()
        per_window: list[float] = []
        teachers: list[float] = []
        kl = agreement = 0.0
        for index, ids in enumerate(self.batches):
            theirs = self._answer(ids) if self.kept is None else self.kept[index]
            teachers += token_losses(theirs, ids).tolist()
            own = student(input_ids=ids).logits[:, :-1].float()
            per_window += token_losses(own, ids).tolist()
            flat = own.flatten(0, 1), theirs.flatten(0, 1)
            kl += float(tempered_kl(*flat, temperature=1.0)) * len(ids)
            agreement += float((own.argmax(-1) == theirs.argmax(-1)).float().mean(-1).sum())
        count = len(per_window)
        return {
            "loss": sum(per_window) / count,
            "kl": kl / count,
            "agreement": agreement / count,
            "teacher_loss": sum(teachers) / count,
            "window_losses": [round(loss, 4) for loss in per_window],
        }

    @torch.no_grad()
    def _answer(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.teacher(input_ids=ids).logits[:, :-1].float()
        return logits


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean loss of each window's next tokens, [windows], in nats."""
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(-1)
