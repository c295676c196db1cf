"""What the parts of a run take on each of many devices, in bytes, from shapes alone."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cleangpt.blocks import BlockStack
from cleangpt.structure import count_parameters
from distillation.accelerators import Cluster
from distillation.batch import MEASURED_AT_ONCE
from distillation.cache_plan import CachePlan, needed_bytes, plan_cache
from distillation.plan import head_parameters, stitch_parameters
from distillation.workload import Workload

_POINTS = [(index + 0.5) / 200 for index in range(200)]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run is laid out.

    Args:
        kept_widths: Widths of the states that are kept of each position.
        shards_teacher: Whether the teacher's blocks are spread over the devices.
        teacher_itemsize: Bytes per number of the teacher's weights.
        cache: "auto", "ram", "disk" or "off".
        cache_bytes: What states may take on a node; None is half of what is free.
        state_dtype: "fp32" or "bf16", of kept states.
        audit_tokens: On how many tokens the teacher's states are measured before the stages; 0 if
            they are not.
        read_out_fits: How often all stitches are fitted again: at the end of the blocks, and of the
            polish.
    """

    kept_widths: Sequence[int]
    shards_teacher: bool = False
    teacher_itemsize: int = 4
    cache: str = "auto"
    cache_bytes: int | None = None
    state_dtype: str = "fp32"
    audit_tokens: int = 0
    read_out_fits: int = 0


@dataclass(frozen=True)
class DeviceMemory:
    """What lies on one device in a stage, in bytes."""

    teacher: float
    student: float
    training: float
    passing: float
    states: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.teacher + self.student + self.training + self.passing + self.states


def outside_blocks(stack: BlockStack) -> int:
    """Parameters of embeddings, final norm and a head of its own."""
    blocks = sum(count_parameters(stack.block(index)) for index in range(stack.num_blocks))
    return count_parameters(stack.model) - blocks


def blocks_whole(layer_map: Sequence[int]) -> int:
    """How many blocks of a spread teacher stay whole: as many as one student block stands for."""
    before = (-1, *layer_map[:-1])
    return max(1, *(own - last for last, own in zip(before, layer_map, strict=True)))


def copies(batch_size: int, devices: int, epochs: int) -> float:
    """On how many devices a row's states are computed and kept, on average over rows.

    Of each batch a device gets the rows between two ranks in the order of their keys
    (``Ranks.share``). In other company a row has another rank: of B random rows, that whose key is
    at share u of all keys has a binomial rank with mean ``B u``, here by its normal approximation.

    Args:
        batch_size: Rows of a batch, of all devices.
        devices: How many there are.
        epochs: How often each row comes by, in another batch each time.
    """
    if devices == 1 or epochs <= 1:
        return 1.0
    seen = [_devices_seen(point, batch_size, devices, epochs) for point in _POINTS]
    return sum(seen) / len(seen)


def _devices_seen(share: float, batch_size: int, devices: int, epochs: int) -> float:
    """The same of a row whose key is at this share of all keys."""
    mean = batch_size * share
    spread = math.sqrt(2 * batch_size * share * (1 - share))
    width = batch_size / devices
    first = max(0, math.floor((mean - 5 * spread) / width))
    last = min(devices - 1, math.floor((mean + 5 * spread) / width))
    below = [
        0.0 if edge == 0 else 1.0 if edge == devices else
        (1 + math.erf((edge * width - mean) / spread)) / 2
        for edge in range(first, last + 2)
    ]  # fmt: skip
    chances = [high - low for low, high in itertools.pairwise(below)]
    return sum(1 - (1 - chance) ** epochs for chance in chances)


def slowest_share(batch_size: int, devices: int, epochs: int) -> float:
    """Rows whose states a batch waits for, in all epochs, over those of one device's share.

    A device computes the rows of its share that it has not seen, and all wait for the one that has
    most of them: the largest of as many binomial numbers as there are devices. The arguments are
    those of :func:`copies`.
    """
    rows = math.ceil(batch_size / devices)
    seen = [0.0] + [copies(batch_size, devices, count) for count in range(1, max(1, epochs) + 1)]
    new = [min(1.0, after - before) for before, after in itertools.pairwise(seen)]
    busy = min(devices, batch_size)  # the others have no row
    return sum(_largest_of(busy, rows, chance) for chance in new) / rows


def _largest_of(count: int, rows: int, chance: float) -> float:
    """The expected largest of ``count`` binomial numbers, each of so many rows."""
    if chance <= 0.0 or chance >= 1.0:
        return rows * chance
    at_most, largest = 0.0, 0.0
    for number in range(rows):
        ways = math.lgamma(rows + 1) - math.lgamma(number + 1) - math.lgamma(rows - number + 1)
        both = number * math.log(chance) + (rows - number) * math.log1p(-chance)
        at_most += math.exp(ways + both)
        largest += 1 - min(1.0, at_most) ** count
    return largest


def teacher_bytes(teacher: BlockStack, work: Workload, cluster: Cluster, setup: Setup) -> float:
    """The teacher's weights on one device.

    Args:
        teacher: The teacher.
        work: What is trained on.
        cluster: The devices.
        setup: How the run is laid out.
    """
    outside = outside_blocks(teacher)
    blocks = count_parameters(teacher.model) - outside
    if not setup.shards_teacher:
        return float(setup.teacher_itemsize * (outside + blocks))
    largest = max(count_parameters(teacher.block(index)) for index in range(teacher.num_blocks))
    # One more than stay whole: a block is received into a buffer and copied out of it.
    whole = (blocks_whole(work.layer_map) + 1) * largest
    return setup.teacher_itemsize * (outside + blocks / cluster.count + whole)


def student_bytes(teacher: BlockStack, student: BlockStack) -> float:
    """The student's weights, all stitches, and the head once it has a weight of its own."""
    stitches = student.num_blocks * stitch_parameters(teacher, student)
    return 4.0 * (count_parameters(student.model) + head_parameters(student) + stitches)


def fit_bytes(teacher: BlockStack, student: BlockStack) -> float:
    """The float64 sums of all stitches' regressions, in the host's memory."""
    width = student.hidden_size + 1
    return 8.0 * student.num_blocks * width * (width + teacher.hidden_size)


@dataclass(frozen=True)
class KeptStates:
    """The frozen states that a device keeps.

    Args:
        cache: Where they lie.
        rolling: Bytes of one level of each model, of all rows that the device sees.
        waits: Passes of the rows that each batch waits for, over those of a device's own rows.
        levels: Bytes of all levels that a stage wants at once; None if they do not fit into memory.
        level_waits: The same as ``waits``, in that stage.
    """

    cache: CachePlan
    rolling: int
    waits: float
    levels: int | None
    level_waits: float


def kept_states(
    teacher: BlockStack,
    student: BlockStack,
    works: tuple[Workload, Workload],
    cluster: Cluster,
    setup: Setup,
) -> KeptStates:
    """Where a device keeps which states, and what they take.

    Args:
        teacher: The teacher.
        student: The student.
        works: What all devices are trained on, and what one is.
        cluster: The devices.
        setup: How the run is laid out.
    """
    work, local = works
    block_epochs = max(work.epochs_per_block)
    level_epochs = block_epochs if work.schedule == "parallel_local" else 0
    if work.polish_reads_levels:
        level_epochs = max(level_epochs, work.polish_epochs)
    several, of_levels = (
        copies(work.batch_size, cluster.count, epochs) for epochs in (block_epochs, level_epochs)
    )
    waits, level_waits = (
        slowest_share(work.batch_size, cluster.count, epochs)
        for epochs in (block_epochs, level_epochs)
    )
    need = needed_bytes(math.ceil(local.positions * several), setup.kept_widths, setup.state_dtype)
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
    widths = [setup.kept_widths[0]] * work.levels_at_once(teacher.num_blocks)
    levels = needed_bytes(math.ceil(local.positions * of_levels), widths, setup.state_dtype)
    fits = cache.kind == "ram" and levels <= cache.budget_bytes
    return KeptStates(cache, need, waits, levels if fits else None, level_waits)


def positions_at_once(work: Workload) -> int:
    """Of how many positions all levels are measured at once, on every device."""
    return max(1, min(work.batch_size, MEASURED_AT_ONCE // work.seq_len)) * work.seq_len


def measured_bytes(teacher: BlockStack, work: Workload, setup: Setup) -> float:
    """States of all levels of these positions, and one level's in float32 and float64 twice."""
    per_channel = (teacher.num_blocks + 1) * setup.teacher_itemsize + 24
    return float(positions_at_once(work) * teacher.hidden_size * per_channel)
