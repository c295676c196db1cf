"""What a run would cost on many devices, told from shapes alone: nothing is measured or loaded.

The formulas are in docs/scaling.md, each with a run that checked it. What every stage computes is
counted in ``plan``; here are how long that takes on devices known by their makers' figures, what
lies in the memory of each, and what they tell each other. Nothing overlaps: gradients are summed
after a backward pass, and blocks of a spread teacher are gathered before they run.
"""

import itertools
import math
from dataclasses import dataclass, replace

from cleangpt.blocks import BlockStack
from cleangpt.metrics_log import format_seconds
from cleangpt.structure import count_parameters
from distillation.accelerators import Cluster
from distillation.cache_plan import CachePlan, needed_bytes, plan_cache, shown_bytes
from distillation.disk_needs import disk_needs, trains_whole_student
from distillation.plan import (
    ADAM_BYTES,
    RunPlan,
    StageEstimate,
    Workload,
    block_flops,
    chunk_memory,
    head_parameters,
    plan_run,
    polish_memory,
    stage_memory,
    states_memory,
    stitch_parameters,
)
from distillation.probe import Costs
from distillation.read_outs import READ_OUT_TOKENS
from distillation.scale_sizes import (
    DeviceMemory,
    Setup,
    blocks_whole,
    copies,
    fit_bytes,
    outside_blocks,
    student_bytes,
    teacher_bytes,
)

_OPTIMIZER_TRAFFIC = 28
"""Bytes AdamW moves per parameter: weight, gradient and two moments in, all but one of them out."""


@dataclass(frozen=True)
class StageNeeds:
    """One stage.

    Args:
        name: The stage's name.
        steps: Optimizer steps.
        flops: Operations of all devices.
        seconds: How long it takes.
        memory: On each device.
        reduced_bytes: The message that all devices sum up in each step.
        gathers: How often a block of a spread teacher is gathered in the whole stage.
    """

    name: str
    steps: int
    flops: float
    seconds: float
    memory: DeviceMemory
    reduced_bytes: int
    gathers: int


@dataclass(frozen=True)
class ScalePlan:
    """A whole run on a cluster.

    Args:
        cluster: Where it runs.
        stages: In order.
        cache: Where each device keeps its states.
        needed_bytes: What all states of a device take.
        kept_share: The share of them that it has room for.
        block_bytes: A block of the teacher.
        disk_bytes: On each device's share of the drives.
        output_bytes: Checkpoints and the student's files, at most, on one disk.
        audit_bytes: On each device while the teacher is measured, besides the weights; 0 if it is
            not.
        fit_bytes: In the host's memory, per device, while stitches are fitted at the end.
        spread_saves: Bytes per device that a spread teacher takes less than a whole one.
        measuring_gathers: How often a block of a spread teacher is gathered for the audit and for
            fitting stitches.
    """

    cluster: Cluster
    stages: list[StageNeeds]
    cache: CachePlan
    needed_bytes: int
    kept_share: float
    block_bytes: float
    disk_bytes: float
    output_bytes: int
    audit_bytes: float
    fit_bytes: float
    spread_saves: float
    measuring_gathers: int

    @property
    def seconds(self) -> float:
        """The time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak(self) -> StageNeeds:
        """The stage that takes most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def gathered_bytes(self) -> float:
        """What each device receives of a spread teacher's blocks, in all."""
        gathers = sum(stage.gathers for stage in self.stages) + self.measuring_gathers
        return self.cluster.gathered(gathers * self.block_bytes)

    def table(self) -> str:
        """All of it as text."""
        head = ("stage", "steps", "PFLOP", "time", "memory", "summed/step", "gathered")
        row = "{:12}  {:>9}  {:>10}  {:>9}  {:>8}  {:>11}  {:>9}"
        lines = [row.format(*head)]
        # Most blocks cost the same: one line for all neighbours whose cells are equal.
        for cells, group in itertools.groupby(self.stages, self._cells):
            names = [stage.name for stage in group]
            ends = names[0] + f"..{names[-1].removeprefix('block-')}" * (len(names) > 1)
            lines.append(row.format(ends, *cells))
        kind, count, hours = self.cluster.kind.name, self.cluster.count, self.seconds / 3600
        flops = sum(stage.flops for stage in self.stages)
        peak = self.peak.memory
        lines += [
            f"in all: {flops / 1e15:,.1f} PFLOP, {hours:,.2f} h on {count} {kind} at"
            f" {self.cluster.efficiency:.0%} of their peak: {hours * count:,.1f} device hours",
            f"memory per device, at most {shown_bytes(int(peak.total))} ({self.peak.name}):"
            f" teacher {shown_bytes(int(peak.teacher))}, student {shown_bytes(int(peak.student))},"
            f" gradients and moments {shown_bytes(int(peak.training))}, a batch's states"
            f" {shown_bytes(int(peak.passing))}, kept states {shown_bytes(int(peak.states))}",
            f"frozen states, per device: {self.cache.reason}",
            f"disk: {shown_bytes(int(self.disk_bytes))} of states per device;"
            f" {shown_bytes(int(self.output_bytes))} for checkpoints and the student",
        ]
        if self.gathered_bytes:
            received = shown_bytes(int(self.gathered_bytes))
            lines.append(f"blocks of the teacher gathered: {received} per device")
        return "\n".join(lines)

    def _cells(self, stage: StageNeeds) -> tuple[str, ...]:
        """A stage as its line in the table shows it, but for its name."""
        gathered = self.cluster.gathered(stage.gathers * self.block_bytes)
        return (
            *(f"{stage.steps:,}", f"{stage.flops / 1e15:,.2f}", format_seconds(stage.seconds)),
            *(shown_bytes(int(stage.memory.total)), shown_bytes(stage.reduced_bytes)),
            shown_bytes(int(gathered)),
        )


def plan_at_scale(
    teacher: BlockStack, student: BlockStack, work: Workload, cluster: Cluster, setup: Setup
) -> ScalePlan:
    """Count what every stage costs each device.

    Args:
        teacher: The teacher, with or without weights.
        student: The student, with or without weights.
        work: What all devices together are trained on.
        cluster: The devices.
        setup: How the run is laid out.
    """
    # A process computes its share of each batch's rows, and at least one of some.
    local = replace(
        work,
        positions=math.ceil(work.positions / cluster.count),
        batch_size=math.ceil(work.batch_size / cluster.count),
    )
    several = copies(work.batch_size, cluster.count, max(work.epochs_per_block))
    cache, need, levels_need = _kept(teacher, student, (work, local), cluster, setup, several)
    local = replace(local, levels_fit=levels_need is not None)
    if work.schedule == "parallel_local":
        need = max(need, levels_need or 0)
    costs = device_costs(teacher, student, local, cluster)
    if cache.kind != "off" and need <= cache.budget_bytes:
        # In other batches some rows are another process's, which runs the frozen blocks too.
        costs = replace(
            costs,
            teacher_block=several * costs.teacher_block,
            student_block=several * costs.student_block,
        )
    run = plan_run(teacher, student, local, costs, cache, need)
    lay_out = _LayOut(teacher, student, work, local, cluster, setup, run, levels_need or 0)
    stages = [lay_out.stage(index, own) for index, own in enumerate(run.stages)]
    whole, spread = (
        teacher_bytes(teacher, work, cluster, replace(setup, shards_teacher=shards))
        for shards in (False, True)
    )
    return ScalePlan(
        cluster,
        stages,
        cache,
        need,
        run.kept_share,
        lay_out.block_bytes,
        run.kept_share * need if cache.kind == "disk" else 0.0,
        _output_bytes(teacher, student, work),
        16.0 * (teacher.num_blocks + 1) * teacher.hidden_size**2 if setup.audit_tokens else 0.0,
        fit_bytes(teacher, student) if setup.read_out_fits else 0.0,
        whole - spread,
        _measuring_gathers(teacher, work, setup) if setup.shards_teacher else 0,
    )


def _kept(
    teacher: BlockStack,
    student: BlockStack,
    works: tuple[Workload, Workload],
    cluster: Cluster,
    setup: Setup,
    several: float,
) -> tuple[CachePlan, int, int | None]:
    """Where a device keeps its states, what they take, and all levels at once; None: do not fit.

    Args:
        teacher: The teacher.
        student: The student.
        works: What all devices are trained on, and what one is.
        cluster: The devices.
        setup: How the run is laid out.
        several: On how many devices each row's states are kept.
    """
    work, local = works
    positions = math.ceil(local.positions * several)
    need = needed_bytes(positions, setup.kept_widths, setup.state_dtype)
    weights = teacher_bytes(teacher, work, cluster, setup) + student_bytes(teacher, student)
    # The setting counts what all processes of a machine take together.
    sharing, limit = min(cluster.kind.per_node, cluster.count), setup.cache_bytes
    cache = plan_cache(
        setup.cache,
        need,
        max(0, int(cluster.kind.memory_bytes - weights)),
        int(cluster.kind.disk_bytes),
        None if limit is None else limit // sharing,
    )
    levels = work.levels_at_once(teacher.num_blocks)
    epochs = max(work.epochs_per_block) if work.schedule == "parallel_local" else 0
    if work.polish_reads_levels:
        epochs = max(epochs, work.polish_epochs)
    positions = math.ceil(local.positions * copies(work.batch_size, cluster.count, epochs))
    all_levels = needed_bytes(positions, [setup.kept_widths[0]] * levels, setup.state_dtype)
    fits = cache.kind == "ram" and all_levels <= cache.budget_bytes
    return cache, need, all_levels if fits else None


def _measuring_gathers(teacher: BlockStack, work: Workload, setup: Setup) -> int:
    """How often blocks are gathered for what is measured: every process sees whole batches."""

    def batches(tokens: int) -> int:
        return math.ceil(min(tokens, work.positions) / (work.batch_size * work.seq_len))

    fits = setup.read_out_fits * batches(READ_OUT_TOKENS)
    return batches(setup.audit_tokens) * teacher.num_blocks + fits * (work.layer_map[-1] + 1)


def _output_bytes(teacher: BlockStack, student: BlockStack, work: Workload) -> int:
    trains_all = work.polish_epochs > 0 or trains_whole_student(work.schedule, work.freeze_previous)
    return disk_needs(teacher, student, trains_all=trains_all, states=0).total


def device_costs(
    teacher: BlockStack, student: BlockStack, local: Workload, cluster: Cluster
) -> Costs:
    """Seconds per batch of one device, from its rates.

    Args:
        teacher: The teacher.
        student: The student.
        local: What one device is trained on.
        cluster: The devices.
    """
    tokens = local.batch_size * local.seq_len
    forward = [tokens * block_flops(stack, 0, local.seq_len) for stack in (teacher, student)]
    stitch = tokens * 2.0 * student.hidden_size * teacher.hidden_size
    heads = tokens * 2.0 * teacher.vocab_size * (teacher.hidden_size + 3 * student.hidden_size)

    def update(trained: int) -> float:
        """Summing gradients over all devices, and the optimizer's step."""
        moved = _OPTIMIZER_TRAFFIC * trained / cluster.kind.memory_rate
        return moved + cluster.reduced(4.0 * trained) / cluster.link

    block = count_parameters(student.block(0)) + stitch_parameters(teacher, student)
    step = 3 * (forward[1] + stitch) / cluster.flops
    return Costs(
        teacher_block=forward[0] / cluster.flops,
        student_block=forward[1] / cluster.flops,
        block_step=step + update(block),
        first_block_step=step + update(block + outside_blocks(student)),
        head_step=heads / cluster.flops + update(head_parameters(student)),
    )


class _LayOut:
    """One device's share of every stage."""

    def __init__(
        self,
        teacher: BlockStack,
        student: BlockStack,
        work: Workload,
        local: Workload,
        cluster: Cluster,
        setup: Setup,
        run: RunPlan,
        levels_bytes: int,
    ) -> None:
        self.teacher, self.student = teacher, student
        self.work, self.local = work, local
        self.cluster, self.setup, self.run = cluster, setup, run
        self.levels_bytes = levels_bytes
        self.block_bytes = float(setup.teacher_itemsize * count_parameters(teacher.block(0)))

    def stage(self, index: int, own: StageEstimate) -> StageNeeds:
        """What one stage needs."""
        gathers = self.gathers(index, own) if self.setup.shards_teacher else 0
        seconds = self.run.seconds_of(own)
        seconds += self.cluster.gathered(gathers * self.block_bytes) / self.cluster.gathering
        seconds += own.steps * self._read_bytes() / self.cluster.kind.disk_rate
        share = self.run.kept_share
        flops = share * own.flops[0] + (1 - share) * own.flops[1]
        trained = self.trained(own.name)
        message = 4 * trained if self.cluster.count > 1 else 0  # gradients side by side
        memory = DeviceMemory(
            teacher=teacher_bytes(self.teacher, self.work, self.cluster, self.setup),
            student=student_bytes(self.teacher, self.student),
            training=float(ADAM_BYTES * trained),
            passing=float(self._passing(own.name) + message),
            states=self._states(own.name),
        )
        total = flops * self.cluster.count
        return StageNeeds(own.name, own.steps, total, seconds, memory, 4 * trained, gathers)

    def trained(self, name: str) -> int:
        """Parameters that learn in a stage: the size of what is summed up over the devices."""
        head = head_parameters(self.student)
        if name == "lm-head":
            return head
        stitch = stitch_parameters(self.teacher, self.student)
        if name == "polish":
            stitches = self.student.num_blocks * stitch if self.work.polish_reads_levels else 0
            return count_parameters(self.student.model) + head + stitches
        block = int(name.removeprefix("block-"))
        own = count_parameters(self.student.block(block)) + stitch
        return own + (outside_blocks(self.student) if block == 0 else 0)

    def gathers(self, index: int, own: StageEstimate) -> int:
        """How often blocks of the teacher are gathered in a stage.

        In sequence and with all states kept, a stage runs the blocks between two targets, and they
        stay whole from its first batch to its last. Where all levels are wanted at once, they run
        for every batch, kept or not: some process nearly always has a row that was another's.
        """
        work, kept = self.work, self.run.kept_share == 1.0
        batches, steps = math.ceil(work.batches), own.steps
        if own.name in ("polish", "lm-head"):
            return self.teacher.num_blocks + self._logit_gathers(own.name, batches, steps, kept)
        target = work.layer_map[index]
        new = target - (work.layer_map[index - 1] if index else -1)
        if work.schedule == "parallel_local":
            return new * steps
        if kept or target < blocks_whole(work.layer_map):  # few enough to stay whole
            return new
        return steps * (target + 1)

    def _logit_gathers(self, name: str, batches: int, steps: int, kept: bool) -> int:
        """The same of head and polish, besides one pass that looks at how the head computes."""
        work, total = self.work, self.teacher.num_blocks
        if name == "polish":
            if work.polish_reads_levels:
                return steps * total
            return 0 if kept and work.head_epochs is not None else steps * total
        if work.schedule == "parallel_local" and kept:
            return batches * total
        return total - 1 - work.layer_map[-1] if kept else steps * total

    def _passing(self, name: str) -> int:
        """What a batch's states take on their way, and the graph of what learns."""
        work, student = self.local, self.student
        states = states_memory(self.teacher, student, work)
        if name == "lm-head":
            graph = chunk_memory(student, work)
        elif name == "polish":
            learning = count_parameters(student.model) + head_parameters(student)
            graph = polish_memory(student, work) - ADAM_BYTES * learning
        else:
            block = int(name.removeprefix("block-"))
            alone = replace(work, schedule="sequential", freeze_previous=True)
            graph = stage_memory(student, alone, block)
            learning = count_parameters(student.block(block))
            graph -= ADAM_BYTES * (learning + (outside_blocks(student) if block == 0 else 0))
        return states + graph

    def _states(self, name: str) -> float:
        """What is kept in memory."""
        if self.run.cache.kind != "ram":
            return 0.0
        if name == "polish" and self.work.polish_reads_levels and self.local.levels_fit:
            return float(self.levels_bytes)  # the others have made room
        return self.run.kept_share * self.run.cache_bytes

    def _read_bytes(self) -> float:
        """What each step reads of states that are kept on a drive."""
        if self.run.cache.kind != "disk":
            return 0.0
        tokens = self.local.batch_size * self.local.seq_len
        per_step = needed_bytes(tokens, self.setup.kept_widths, self.setup.state_dtype)
        return self.run.kept_share * per_step
