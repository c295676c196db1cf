"""What each stage of a run takes on each of many devices, told from shapes alone."""

import math
from dataclasses import dataclass, replace

from cleangpt.blocks import BlockStack
from cleangpt.structure import count_parameters
from distillation.accelerators import Cluster
from distillation.cache_plan import needed_bytes
from distillation.plan import (
    ADAM_BYTES,
    RunPlan,
    StageEstimate,
    chunk_memory,
    head_parameters,
    polish_memory,
    stage_memory,
    states_memory,
    stitch_parameters,
)
from distillation.scale_sizes import (
    DeviceMemory,
    KeptStates,
    Setup,
    blocks_whole,
    outside_blocks,
    student_bytes,
    teacher_bytes,
)
from distillation.workload import Workload


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


class LayOut:
    """One device's share of every stage.

    Args:
        teacher: The teacher.
        student: The student.
        works: What all devices are trained on, and what one is.
        cluster: The devices.
        setup: How the run is laid out.
        run: What one device does.
        kept: The states that it keeps.
    """

    def __init__(
        self,
        teacher: BlockStack,
        student: BlockStack,
        works: tuple[Workload, Workload],
        cluster: Cluster,
        setup: Setup,
        run: RunPlan,
        kept: KeptStates,
    ) -> None:
        self.teacher, self.student = teacher, student
        self.work, self.local = works
        self.cluster, self.setup, self.run, self.kept = cluster, setup, run, kept
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
        stitch = self.work.trains_stitches * stitch_parameters(self.teacher, self.student)
        if name == "polish":
            stitches = self.student.num_blocks * stitch * self.work.polish_reads_levels
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
        return states + graph + self._levels_on_their_way(name)

    def _wants_levels(self, name: str) -> bool:
        """Whether a stage asks for all teaching levels at once."""
        if name == "polish":
            return self.work.polish_reads_levels
        return name != "lm-head" and self.work.schedule == "parallel_local"

    def _levels_on_their_way(self, name: str) -> int:
        """Those of one batch: of every block that runs, and twice of those that teach."""
        if not self._wants_levels(name):
            return 0
        wanted = self.work.levels_at_once(self.teacher.num_blocks)
        levels = self.work.layer_map[-1] + 2 + 2 * wanted
        tokens = self.local.batch_size * self.local.seq_len
        return tokens * levels * self.teacher.hidden_size * self.setup.teacher_itemsize

    def _states(self, name: str) -> float:
        """What is kept in memory."""
        if self.kept.cache.kind != "ram":
            return 0.0
        if self._wants_levels(name) and self.kept.levels is not None:
            return float(self.kept.levels)  # what rolls has made room
        if name.startswith("block") and self.work.schedule == "parallel_local":
            return 0.0
        return self.run.kept_share * self.kept.rolling

    def _read_bytes(self) -> float:
        """What each step reads of states that are kept on a drive."""
        if self.run.cache.kind != "disk":
            return 0.0
        tokens = self.local.batch_size * self.local.seq_len
        per_step = needed_bytes(tokens, self.setup.kept_widths, self.setup.state_dtype)
        return self.run.kept_share * per_step
