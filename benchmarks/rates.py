"""What a process of a measured run computes, moves and sends per second, as the others do it too.

Every process measures at the same time, with messages of the sizes that it sends. What a process
computes and moves is the best of many short tries, since other work on the machine comes and goes;
what it sends is the usual of them, since waiting for each other is part of it.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from benchmarks.cases import Shape
from cleangpt.runtime.ranks import Ranks

_REPEATS = 25
_COPIED = 2**25


@dataclass(frozen=True)
class Rates:
    """Rates of one process, per second.

    Args:
        flops: Operations in products of a block's shape.
        memory: Bytes read and written.
        summed: Bytes that each process sends while all sum up the gradients of a block; 0 of one
            process alone.
        gathered: Bytes that each receives while all gather a block of a spread teacher; 0 where
            none is spread.
    """

    flops: float
    memory: float
    summed: float = 0.0
    gathered: float = 0.0


def measure_rates(
    ranks: Ranks, shape: Shape, gradients: Sequence[Tensor], shards: Any, block: int
) -> Rates:
    """Measure this process; all processes of a run at once.

    Args:
        ranks: The processes.
        shape: Sizes of what is trained.
        gradients: Tensors of the shapes of a block's gradients.
        shards: The spread blocks of the teacher; None if it is whole.
        block: Bytes of one of them.
    """
    flops, memory = own_rates(ranks, shape)
    summed = gathered = 0.0
    if ranks.count > 1:
        sent = 2 * (ranks.count - 1) / ranks.count * sum(tensor.nbytes for tensor in gradients)
        summed = sent / statistics.median(times_of(lambda: ranks.sum(gradients), ranks))
    if shards is not None:
        received = (ranks.count - 1) / ranks.count * block

        def gather_two() -> None:
            shards.touch(0)  # one stays whole, so each of them spreads the other
            shards.touch(1)

        gathered = 2 * received / statistics.median(times_of(gather_two, ranks))
    return Rates(flops, memory, summed, gathered)


def own_rates(ranks: Ranks, shape: Shape) -> tuple[float, float]:
    """What this process computes and moves per second, while the others do so too.

    Args:
        ranks: The processes.
        shape: Sizes of what is trained: an MLP of a student block gets this process's rows.
    """
    rows = math.ceil(shape.batch_size / ranks.count) * shape.seq_len
    left = torch.randn(rows, shape.student_width)
    right = torch.randn(shape.student_width, 4 * shape.student_width)
    operations = 2 * left.numel() * right.shape[1]
    flops = operations / min(times_of(lambda: torch.mm(left, right), ranks))
    source, target = torch.empty(_COPIED), torch.empty(_COPIED)
    return flops, 2 * source.nbytes / min(times_of(lambda: target.copy_(source), ranks))


def times_of(work: Callable[[], object], ranks: Ranks) -> list[float]:
    """Seconds of some runs that all processes begin together, after one to warm up."""
    work()
    times = []
    for _ in range(_REPEATS):
        if ranks.count > 1:
            distributed.barrier()
        started_at = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_at)
    return times
