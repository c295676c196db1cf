"""How long the parts of a run take on this machine, measured in about two seconds.

The real stages and the real optimizer steps run, on models of the same kind and width that are one
or two blocks deep and have a short vocabulary, with random weights. Works on models without weights
(on PyTorch's "meta" device): only their classes and configurations are used.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.runtime.precision import Precision
from cleangpt.runtime.ranks import Ranks
from cleangpt.structure import with_blocks
from distillation.activations import Activations
from distillation.batch import Batch, as_batch
from distillation.config import DistillationConfig, StageSettings
from distillation.head_init import untie_lm_head
from distillation.logit_stages import HeadStage
from distillation.losses import DistillationLoss, LogitDistillationLoss
from distillation.stages import BlockStage, Stage
from distillation.trainers.stage_loop import StageLoop, build_optimizer
from stitching_layers import StitchingLayer

_POSITIONS = 2048
_VOCABULARY = 8192
_ROUNDS = 8
_SECONDS = 1.5


@dataclass(frozen=True)
class Costs:
    """Seconds per batch of a run.

    Args:
        teacher_block: Forward pass of one teacher block.
        student_block: Forward pass of one frozen student block.
        block_step: Optimizer step of one student block and its stitch.
        first_block_step: The same with the embeddings, which learn together with block 0.
        head_step: Optimizer step of the head phase.
    """

    teacher_block: float
    student_block: float
    block_step: float
    first_block_step: float
    head_step: float


def measure_costs(
    teacher: nn.Module,
    student: nn.Module,
    *,
    batch_size: int,
    seq_len: int,
    config: DistillationConfig,
    precision: Precision,
    device: torch.device,
) -> Costs:
    """Measure what a batch of ``[batch_size, seq_len]`` costs.

    Args:
        teacher: The run's teacher, with or without weights.
        student: The run's student, with or without weights.
        batch_size: Windows per batch; fewer are measured, and the rest is in proportion.
        seq_len: Tokens per window.
        config: The run's settings.
        precision: The run's precision.
        device: Where the run trains.
    """
    with torch.random.fork_rng():
        small_teacher = shrunk(teacher, 1).to(device)
        small_student = shrunk(student, 2).to(device)
        rows = max(1, min(batch_size, _POSITIONS // seq_len))
        vocabulary = BlockStack(small_student).vocab_size
        ids = torch.arange(rows * seq_len).reshape(rows, seq_len) % vocabulary
        batch = as_batch(ids, device)
        states = _Fixed(BlockStack(small_teacher), BlockStack(small_student), batch)
        measured = _measure(states, batch, config, precision)
    scale = batch_size / rows
    longer = BlockStack(student).vocab_size / vocabulary
    per_word = max(0.0, measured.first_block_step - measured.block_step)
    return Costs(
        teacher_block=scale * measured.teacher_block,
        student_block=scale * measured.student_block,
        block_step=scale * measured.block_step,
        # The embeddings' optimizer step depends on their rows, not on the batch.
        first_block_step=scale * measured.block_step + longer * per_word,
        head_step=scale * longer * measured.head_step,
    )


def shrunk(model: nn.Module, num_blocks: int) -> nn.Module:
    """A model of the same kind and width with few blocks, few tokens and random weights."""
    config = with_blocks(model.config, range(num_blocks))
    text = config.get_text_config()
    text.vocab_size = min(int(text.vocab_size), _VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "padding_idx"):
        for owner in (config, text):
            if getattr(owner, name, None) is not None:
                setattr(owner, name, None)
    with torch.random.fork_rng():
        small: nn.Module = type(model)(config)
    return small.float().eval().requires_grad_(False)


class _Fixed(Activations):
    """The same states for every block: only the time they are used in is of interest."""

    def __init__(self, teacher: BlockStack, student: BlockStack, batch: Batch) -> None:
        super().__init__(teacher, student, 0)
        with torch.no_grad():
            self.taught = teacher.state_entering(1, batch.input_ids)
            self.entering = student.state_entering(1, batch.input_ids)

    def teacher_output(self, block: int, batch: Batch) -> Tensor:
        """The output of the only block."""
        return self.taught

    def student_input(self, block: int, batch: Batch) -> Tensor:
        """The output of block 0."""
        return self.entering


def _measure(
    states: _Fixed, batch: Batch, config: DistillationConfig, precision: Precision
) -> Costs:
    teacher, student = states.teacher, states.student
    device = batch.input_ids.device

    def forward(stack: BlockStack, state: Tensor) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> Tensor:
            with precision.autocast(device):
                return stack.advance(0, state, batch.input_ids)

        return run

    def step(stage: Stage) -> Callable[[], object]:
        for parameter in stage.trainable_parameters().values():
            parameter.requires_grad_(True)
        # No step moves anything far: only its time is of interest.
        settings = StageSettings(epochs=1, lr=1e-6)
        optimizer = build_optimizer(torch.optim.AdamW, stage, settings)
        loop = StageLoop(stage, config, settings, optimizer, 10**6, precision, Ranks())
        return lambda: loop.step([batch], [batch])

    def block_stage(block: int) -> BlockStage:
        stitch = StitchingLayer(student.hidden_size, teacher.hidden_size).to(device)
        loss = DistillationLoss(config.distill_loss_type, config.distill_loss_temperature)
        return BlockStage(block, 0, states, loss, stitch=stitch, freeze_previous=True)

    untie_lm_head(student)
    logit_loss = LogitDistillationLoss(config.logit_loss_type, config.logit_loss_temperature)
    with torch.no_grad():
        entering = student.state_entering(0, batch.input_ids)
        teacher_entering = teacher.state_entering(0, batch.input_ids)
    return Costs(
        **shortest(
            {
                "teacher_block": forward(teacher, teacher_entering),
                "student_block": forward(student, entering),
                "block_step": step(block_stage(1)),
                "first_block_step": step(block_stage(0)),
                "head_step": step(HeadStage(states, logit_loss, loss_weight=1.0)),
            }
        )
    )


def _synchronize() -> None:
    """Wait for what an accelerator has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shortest(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The seconds of each work at its best, after one run of each to warm up.

    They run in turns, so that a moment in which the machine is busy with something else meets all
    of them once, not one of them always.
    """
    for work in works.values():
        work()
    _synchronize()
    best = dict.fromkeys(works, float("inf"))
    rounds, begun_at = 0, time.perf_counter()
    while rounds < 1 or (rounds < _ROUNDS and time.perf_counter() - begun_at < _SECONDS):
        for name, work in works.items():
            started_at = time.perf_counter()
            work()
            _synchronize()
            best[name] = min(best[name], time.perf_counter() - started_at)
        rounds += 1
    return best
