"""What a run will cost, told before it starts: operations, time, memory and disk.

Times come from :mod:`distillation.probe`, everything else from shapes. Only matrix products are
counted as operations, with two per multiply-add; causal attention reads half of its square.
"""

import math
from dataclasses import dataclass
from typing import Any

from cleangpt.blocks import BlockStack
from cleangpt.metrics_log import format_seconds
from cleangpt.structure import count_parameters
from distillation.cache_plan import CachePlan, shown_bytes
from distillation.disk_needs import disk_needs, trains_whole_student
from distillation.losses.chunked import LOGITS_AT_ONCE
from distillation.probe import Costs
from distillation.workload import Passes, Workload

LOSS_SHARE = 1 / 3
"""Of a training step, what taking its loss alone costs: a backward pass is two forward ones."""
ADAM_BYTES = 12
"""Per trained parameter: a gradient and two moments in float32."""


@dataclass(frozen=True)
class StageEstimate:
    """One stage.

    Args:
        name: The stage's name.
        steps: Batches it trains on.
        flops: Operations with states kept, and without.
        seconds: The same in time.
    """

    name: str
    steps: int
    flops: tuple[float, float]
    seconds: tuple[float, float]


@dataclass(frozen=True, repr=False)
class RunPlan:
    """The whole run.

    Args:
        stages: In order.
        kept_share: The share of the states there is room for: 1 keeps all, 0 none.
        cache: Where states are kept.
        cache_bytes: What all of them take.
        memory_bytes: Most memory above what the process had before models were loaded.
        disk_bytes: What the run writes, states included.
    """

    stages: list[StageEstimate]
    kept_share: float
    cache: CachePlan
    cache_bytes: int
    memory_bytes: int
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """The time of all stages, as planned."""
        return sum(self.seconds_of(stage) for stage in self.stages)

    def seconds_of(self, stage: StageEstimate) -> float:
        """The time of one stage with as many states kept as there is room for."""
        kept, streamed = stage.seconds
        return self.kept_share * kept + (1 - self.kept_share) * streamed

    def summary(self) -> dict[str, Any]:
        """What the manifest of the run keeps, to be held against what it took."""
        return {
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "stages": [
                {"stage": stage.name, "steps": stage.steps, "seconds": self.seconds_of(stage)}
                for stage in self.stages
            ],
        }

    def __repr__(self) -> str:
        """The table, for terminals and notebooks."""
        return self.table()

    def table(self) -> str:
        """All of it as text."""
        lines = [f"{'stage':10}  {'steps':>9}  {'TFLOP':>9}  {'cache on':>10}  {'cache off':>10}"]
        for stage in self.stages:
            kept, streamed = (format_seconds(value) for value in stage.seconds)
            tera = f"{stage.flops[0] / 1e12:,.2f}"
            times = f"{kept:>10}  {streamed:>10}"
            lines.append(f"{stage.name:10}  {stage.steps:9,}  {tera:>9}  {times}")
        kept, streamed = (
            format_seconds(sum(stage.seconds[i] for stage in self.stages)) for i in (0, 1)
        )
        tera = f"{sum(stage.flops[0] for stage in self.stages) / 1e12:,.2f}"
        steps = sum(stage.steps for stage in self.stages)
        lines.append(f"{'in all':10}  {steps:9,}  {tera:>9}  {kept:>10}  {streamed:>10}")
        lines.append(f"frozen states: {self.cache.reason}")
        lines.append(f"this run: {format_seconds(self.seconds)}")
        lines.append(f"memory: {shown_bytes(self.memory_bytes)} more than before the models")
        lines.append(f"disk: {shown_bytes(self.disk_bytes)}")
        return "\n".join(lines)


def planned_seconds(summary: dict[str, Any] | None) -> dict[str, float]:
    """The seconds of each stage by its name, of a plan's summary; empty if there was no plan."""
    stages = summary["stages"] if summary else ()
    return {stage["stage"]: stage["seconds"] for stage in stages}


def plan_run(
    teacher: BlockStack,
    student: BlockStack,
    work: Workload,
    costs: Costs,
    cache: CachePlan,
    cache_bytes: int,
) -> RunPlan:
    """Count what every stage does.

    Args:
        teacher: The teacher, with or without weights.
        student: The student, with or without weights.
        work: What is trained on.
        costs: What the parts cost per batch.
        cache: Where states are kept.
        cache_bytes: What keeping all of them takes.
    """
    share = 0.0 if cache.kind == "off" else min(1.0, cache.budget_bytes / max(1, cache_bytes))
    stages = _block_stages(teacher, student, work, costs)
    if work.head_epochs is not None:
        stages.append(_head_stage(teacher, student, work, costs))
    if work.polish_epochs:
        stages.append(_polish_stage(teacher, student, work, costs))
    kept = int(share * cache_bytes)
    in_memory, on_disk = (kept, 0) if cache.kind == "ram" else (0, kept)
    memory = memory_parts(teacher, student, work, in_memory)
    trains_all = work.polish_epochs > 0 or trains_whole_student(work.schedule, work.freeze_previous)
    disk = disk_needs(teacher, student, trains_all=trains_all, states=on_disk)
    return RunPlan(stages, share, cache, cache_bytes, sum(memory.values()), disk.total)


def memory_parts(
    teacher: BlockStack, student: BlockStack, work: Workload, kept_bytes: int
) -> dict[str, int]:
    """What the memory of a run is for at its peak, in bytes.

    Args:
        teacher: The teacher, with or without weights.
        student: The student, with or without weights.
        work: What is trained on.
        kept_bytes: Frozen states that are kept in memory.
    """
    stitch = stitch_parameters(teacher, student)
    training = max(stage_memory(student, work, block) for block in range(student.num_blocks))
    if work.head_epochs is not None:
        training = max(training, head_memory(student, work))
    if work.polish_epochs:
        learn = work.polish_reads_levels and work.trains_stitches
        others = (student.num_blocks - 1) * learn  # of the stitches
        training = max(training, polish_memory(student, work) + ADAM_BYTES * others * stitch)
    frozen = work.teacher_bytes
    if frozen is None:
        frozen = sum(parameter.nbytes for parameter in teacher.model.parameters())
    weights = count_parameters(student.model) + student.num_blocks * stitch
    return {
        "both models and the stitches": frozen + 4 * weights,
        "kept states": kept_bytes,
        "gradients, moments and activations of the stage in training": training
        + ADAM_BYTES * stitch,
        "a batch on its way through the teacher": states_memory(teacher, student, work),
    }


def block_flops(stack: BlockStack, index: int, seq_len: int) -> float:
    """Operations of one block's forward pass, per token."""
    weights = sum(p.numel() for p in stack.block(index).parameters() if p.ndim >= 2)
    return 2.0 * weights + 2.0 * seq_len * stack.hidden_size


def stitch_parameters(teacher: BlockStack, student: BlockStack) -> int:
    """Numbers of one stitching layer."""
    return (student.hidden_size + 1) * teacher.hidden_size


def _block_stages(
    teacher: BlockStack, student: BlockStack, work: Workload, costs: Costs
) -> list[StageEstimate]:
    stages = []
    for block, (target, epochs) in enumerate(
        zip(work.layer_map, work.epochs_per_block, strict=True)
    ):
        before = work.layer_map[block - 1] if block else -1
        once = min(1, epochs)
        if work.schedule == "parallel_local":
            # The teacher's blocks between two targets count for the later one.
            streamed = Passes((target - before) * epochs, 0, epochs)
            runs = once if work.levels_fit else epochs
            fresh = kept = Passes((target - before) * runs, 0, epochs)
        elif not work.freeze_previous:
            kept = Passes((target - before) * once, 0, epochs)
            fresh = Passes((target + 1) * once, 0, epochs)
            streamed = Passes((target + 1) * epochs, 0, epochs)
        else:
            new, whole = target - before, target + 1
            if work.reads_teacher and block:  # rolled on by themselves
                new += before - (work.layer_map[block - 2] if block > 1 else -1)
                whole += before + 1
            chain = block if work.reads_student else 0
            fresh = Passes(whole * once, chain * once, epochs)
            kept = Passes(new * once, min(1, chain) * once, epochs)
            streamed = Passes(whole * epochs, chain * epochs, epochs)
        step = costs.first_block_step if block == 0 else costs.block_step
        blocks_trained = 1
        if not work.freeze_previous:  # the embeddings and all blocks so far
            step = costs.first_block_step + block * costs.block_step
            blocks_trained = block + 1
        training = 3 * (
            blocks_trained * block_flops(student, block, work.seq_len)
            + 2.0 * student.hidden_size * teacher.hidden_size
        )
        passes = work.over_passes(kept, streamed, fresh)
        name = f"block-{block:02d}"
        keeps = work.levels_fit or work.schedule != "parallel_local"
        stages.append(
            _estimate(name, teacher, student, work, costs, passes, step, training, keeps=keeps)
        )
    return stages


def _head_stage(
    teacher: BlockStack, student: BlockStack, work: Workload, costs: Costs
) -> StageEstimate:
    epochs = work.head_epochs or 0
    once = min(1, epochs)
    rest = teacher.num_blocks - 1 - work.layer_map[-1]
    kept = Passes(rest * once, once if work.reads_student else student.num_blocks * once, epochs)
    fresh = Passes(teacher.num_blocks * once, student.num_blocks * once, epochs)
    if work.schedule == "parallel_local":  # nothing was kept of the blocks' pass
        kept = fresh
    streamed = Passes(teacher.num_blocks * epochs, student.num_blocks * epochs, epochs)
    heads = 2.0 * teacher.vocab_size * (teacher.hidden_size + 3 * student.hidden_size)
    passes = work.over_passes(kept, streamed, fresh)
    return _estimate("lm-head", teacher, student, work, costs, passes, costs.head_step, heads)


def _polish_stage(
    teacher: BlockStack, student: BlockStack, work: Workload, costs: Costs
) -> StageEstimate:
    epochs, blocks = work.polish_epochs, student.num_blocks
    # After a head phase the teacher's last states are known.
    once = teacher.num_blocks if work.head_epochs is None else 0
    fresh = teacher.num_blocks
    if work.polish_reads_levels:  # kept side by side, apart from the others
        once = fresh = teacher.num_blocks * (1 if work.levels_fit else epochs)
    passes = work.over_passes(
        Passes(once, 0, epochs),
        Passes(teacher.num_blocks * epochs, 0, epochs),
        Passes(fresh, 0, epochs),
    )
    step = costs.first_block_step + (blocks - 1) * costs.block_step + costs.head_step
    heads = 2.0 * teacher.vocab_size * (teacher.hidden_size + 3 * student.hidden_size)
    flops = 3 * blocks * block_flops(student, 0, work.seq_len) + heads
    keeps = work.levels_fit or not work.polish_reads_levels
    return _estimate("polish", teacher, student, work, costs, passes, step, flops, keeps=keeps)


def _estimate(
    name: str,
    teacher: BlockStack,
    student: BlockStack,
    work: Workload,
    costs: Costs,
    passes: tuple[Passes, Passes],
    step_seconds: float,
    step_flops: float,
    *,
    keeps: bool = True,
) -> StageEstimate:
    """What the passes of a stage, with states kept and without, come to.

    Where it does not keep any, because the levels that it wants side by side do not fit, those of
    held-out text are computed again at every look as well.
    """
    per_teacher = block_flops(teacher, 0, work.seq_len)
    per_student = block_flops(student, 0, work.seq_len)
    flops, seconds = [], []
    for way, is_kept in zip(passes, (True, False), strict=True):
        looks = way.steps + 1 if way.steps else 0
        again = 1 if (is_kept and keeps) or not looks else looks / way.steps
        computed = 1 + work.held_out * again
        trained = way.steps + work.held_out * looks * LOSS_SHARE
        blocks = way.teacher_blocks * per_teacher + way.student_blocks * per_student
        flops.append(work.positions * (computed * blocks + trained * step_flops))
        time = way.teacher_blocks * costs.teacher_block + way.student_blocks * costs.student_block
        seconds.append(work.batches * (computed * time + trained * step_seconds))
    steps = math.ceil(work.batches) * passes[0].steps
    return StageEstimate(name, steps, (flops[0], flops[1]), (seconds[0], seconds[1]))


def stage_memory(student: BlockStack, work: Workload, block: int) -> int:
    """Gradients, moments and the graph of one block in training."""
    blocks = [count_parameters(student.block(index)) for index in range(student.num_blocks)]
    trained = blocks[block]
    if block == 0:  # what is no block is the embeddings, mostly
        trained += count_parameters(student.model) - sum(blocks)
    if trains_whole_student(work.schedule, work.freeze_previous):
        trained = count_parameters(student.model)
    # What a block's graph keeps: norms, queries, keys, values, the MLP inside and out.
    graph = work.batch_size * work.seq_len * 20 * student.hidden_size * 4
    return ADAM_BYTES * trained + graph


def head_memory(student: BlockStack, work: Workload) -> int:
    """Gradients and moments of the head, and a chunk of logits."""
    return ADAM_BYTES * head_parameters(student) + chunk_memory(student, work)


def chunk_memory(student: BlockStack, work: Workload) -> int:
    """A chunk of logits: both models', the student's log-probabilities, an error, its gradient."""
    logits = work.batch_size * work.seq_len * student.vocab_size
    return 5 * 4 * min(LOGITS_AT_ONCE, logits)


def polish_memory(student: BlockStack, work: Workload) -> int:
    """Gradients and moments of everything, the graph of all blocks, and one chunk of logits."""
    trained = count_parameters(student.model) + head_parameters(student)
    graph = work.batch_size * work.seq_len * 20 * student.hidden_size * 4 * student.num_blocks
    return ADAM_BYTES * trained + graph + chunk_memory(student, work)


def head_parameters(student: BlockStack) -> int:
    """Numbers of a head's weight."""
    return student.vocab_size * student.hidden_size


def states_memory(teacher: BlockStack, student: BlockStack, work: Workload) -> int:
    """A batch's states on their way through one block of the teacher."""
    widest = 10 * teacher.hidden_size + 4 * student.hidden_size
    return 4 * work.batch_size * work.seq_len * widest
