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
from distillation.cache_plan import CachePlan, shown_bytes
from distillation.disk_needs import disk_needs, trains_whole_student
from distillation.plan import (
    RunPlan,
    block_flops,
    head_parameters,
    plan_run,
    stitch_parameters,
)
from distillation.probe import Costs
from distillation.read_outs import READ_OUT_TOKENS
from distillation.scale_sizes import (
    KeptStates,
    Setup,
    fit_bytes,
    kept_states,
    measured_bytes,
    outside_blocks,
    positions_at_once,
    teacher_bytes,
)
from distillation.scale_stages import LayOut, StageNeeds
from distillation.trainers.block_rows import CHAIN_TOKENS
from distillation.workload import Workload

_OPTIMIZER_TRAFFIC = 28
"""Bytes AdamW moves per parameter: weight, gradient and two moments in, all but one of them out."""
_MESSAGE_TRAFFIC = 16
"""Bytes per parameter to put gradients side by side for one message, and back."""


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
        measuring_gathers: How often a block of a spread teacher is gathered for the audit, for
            fitting stitches and for the errors of the chain.
        measured_bytes: States of all levels, of the positions that are measured at once.
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
    measured_bytes: float

    @property
    def seconds(self) -> float:
        """The time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak(self) -> StageNeeds:
        """The stage that takes most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def audit_memory(self) -> float:
        """What lies on each device while the teacher is measured; 0 if it is not."""
        weights = self.peak.memory.teacher + self.peak.memory.student
        return self.audit_bytes and self.audit_bytes + self.measured_bytes + weights

    @property
    def gathers(self) -> int:
        """How often a block of a spread teacher is gathered, in all."""
        return sum(stage.gathers for stage in self.stages) + self.measuring_gathers

    @property
    def gathered_bytes(self) -> float:
        """What each device receives of a spread teacher's blocks, in all."""
        return self.cluster.gathered(self.gathers * self.block_bytes)

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
        if self.audit_bytes:
            audit = shown_bytes(int(self.audit_memory))
            lines.append(f"memory per device in the audit, before all stages: {audit}")
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
    kept = kept_states(teacher, student, (work, local), cluster, setup)
    local = replace(local, levels_fit=kept.levels is not None)
    run = _run_of_a_device(teacher, student, local, cluster, kept)
    lay_out = LayOut(teacher, student, (work, local), cluster, setup, run, kept)
    stages = [lay_out.stage(index, own) for index, own in enumerate(run.stages)]
    whole, spread = (
        teacher_bytes(teacher, work, cluster, replace(setup, shards_teacher=shards))
        for shards in (False, True)
    )
    return ScalePlan(
        cluster,
        stages,
        kept.cache,
        run.cache_bytes,
        run.kept_share,
        lay_out.block_bytes,
        run.kept_share * run.cache_bytes if kept.cache.kind == "disk" else 0.0,
        _output_bytes(teacher, student, work),
        16.0 * (teacher.num_blocks + 1) * teacher.hidden_size**2 if setup.audit_tokens else 0.0,
        fit_bytes(teacher, student) if setup.read_out_fits else 0.0,
        whole - spread,
        _measuring_gathers(teacher, work, setup) if setup.shards_teacher else 0,
        measured_bytes(teacher, work, setup),
    )


def _run_of_a_device(
    teacher: BlockStack, student: BlockStack, local: Workload, cluster: Cluster, kept: KeptStates
) -> RunPlan:
    """Count one device's share of every stage."""
    costs = device_costs(teacher, student, local, cluster)
    together = local.schedule == "parallel_local"
    need = max(kept.rolling, kept.levels or 0) if together else kept.rolling

    def planned(times: float) -> RunPlan:
        """With each batch waiting for so many passes through frozen blocks."""
        passes = {
            "teacher_block": times * costs.teacher_block,
            "student_block": times * costs.student_block,
        }
        return plan_run(teacher, student, local, replace(costs, **passes), kept.cache, need)

    # In other batches some rows are another device's, which computes them too if it keeps them:
    # all wait for the device that has most of them.
    rolls = kept.cache.kind != "off" and kept.rolling <= kept.cache.budget_bytes
    of_rolling = kept.waits if rolls else 1.0
    of_levels = 1.0 if kept.levels is None else kept.level_waits
    run = planned(of_levels if together else of_rolling)
    if local.polish_epochs and local.polish_reads_levels:
        run.stages[-1] = planned(of_levels).stages[-1]
    return run


def _measuring_gathers(teacher: BlockStack, work: Workload, setup: Setup) -> int:
    """How often blocks are gathered for what is measured: every process sees all of it."""

    def parts(tokens: int) -> int:
        return math.ceil(min(tokens, work.positions) / positions_at_once(work))

    fits = setup.read_out_fits * parts(READ_OUT_TOKENS)
    fits += 0 if work.learns_in_chain else parts(CHAIN_TOKENS)
    return parts(setup.audit_tokens) * teacher.num_blocks + fits * (work.layer_map[-1] + 1)


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
        traffic = _OPTIMIZER_TRAFFIC + _MESSAGE_TRAFFIC * (cluster.count > 1)
        sent = cluster.reduced(4.0 * trained) / cluster.link
        return traffic * trained / cluster.kind.memory_rate + sent

    block = count_parameters(student.block(0)) + stitch_parameters(teacher, student)
    step = 3 * (forward[1] + stitch) / cluster.flops
    return Costs(
        teacher_block=forward[0] / cluster.flops,
        student_block=forward[1] / cluster.flops,
        block_step=step + update(block),
        first_block_step=step + update(block + outside_blocks(student)),
        head_step=heads / cluster.flops + update(head_parameters(student)),
    )
