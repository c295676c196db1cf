"""What a process of a measured run computes, moves and sends per second, as the others do it too.

All processes measure at the same time, before the run, after each of its stages and at its end,
since what a shared machine gives changes from minute to minute; gathering, which would leave other
blocks whole than the run did, at both ends alone. Every rate is the median of all tries: the usual
one, as a run sees it, and not the best.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed
from torch.nn import functional as F

from benchmarks.cases import Shape, new_student, new_teacher
from cleangpt.blocks import BlockStack
from cleangpt.runtime.ranks import Ranks
from distillation.plan import block_flops

_REPEATS = 7
_COPIED = 2**23
_VOCABULARY = 64


@dataclass(frozen=True)
class Rates:
    """Rates of one process, per second.

    Args:
        flops: Operations, as the plan counts them, in a pass of a teacher's block and a forward and
            backward pass of a student's.
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


class Meter:
    """Takes the rates of this process again and again.

    It has blocks of its own, so that the run's stay as they are.

    Args:
        ranks: The processes; each makes a meter, and they measure together.
        shape: Sizes of what is trained; a block gets this process's rows.
        kind: Kind of student.

    Attributes:
        measures: Whether it is at it just now.
    """

    def __init__(self, ranks: Ranks, shape: Shape, kind: str) -> None:
        self.measures = False
        alone = replace(shape, blocks=1, vocab=_VOCABULARY)
        self._ranks = ranks
        self._teacher = BlockStack(new_teacher(alone))
        self._student = BlockStack(new_student(kind, alone))
        rows = math.ceil(shape.batch_size / ranks.count)
        self._ids = torch.zeros(rows, shape.seq_len, dtype=torch.long)
        with torch.no_grad():
            self._taught = self._teacher.embed(self._ids)
            self._entering = self._student.embed(self._ids)
        self._weights = list(self._student.block(0).parameters())
        teacher = block_flops(self._teacher, 0, shape.seq_len)
        student = block_flops(self._student, 0, shape.seq_len)
        self._operations = self._ids.numel() * (teacher + 3 * student)
        self._times: dict[str, list[float]] = {"flops": [], "memory": [], "summed": []}
        self._gathers: list[float] = []
        self._received = 0.0

    def measure(self) -> None:
        """Take all rates but that of gathering; takes less memory than a stage did."""
        source, target = torch.empty(_COPIED), torch.empty(_COPIED)
        works: dict[str, Callable[[], object]] = {
            "flops": self._pass_and_step,
            "memory": lambda: target.copy_(source),
        }
        if self._ranks.count > 1:
            # As a run sums them, put side by side and back: the plan counts that once more, which
            # adds less than a hundredth to the time it predicts.
            gradients = [torch.zeros_like(weight) for weight in self._weights]
            works["summed"] = lambda: self._ranks.sum(gradients)
        self.measures = True
        for name, work in works.items():
            self._times[name] += times_of(work, self._ranks)
        self.measures = False

    def measure_gathering(self, shards: Any, block_bytes: int) -> None:
        """Take the rate of gathering.

        Args:
            shards: The spread blocks of the teacher.
            block_bytes: Bytes of one of them.
        """
        self._received = 2 * (self._ranks.count - 1) / self._ranks.count * block_bytes

        def gather_two() -> None:
            shards.touch(0)  # one stays whole, so each of them spreads the other
            shards.touch(1)

        self._gathers += times_of(gather_two, self._ranks)

    def rates(self) -> Rates:
        """What was found so far."""
        usual = {name: statistics.median(times) for name, times in self._times.items() if times}
        count = self._ranks.count
        sent = 2 * (count - 1) / count * sum(weight.nbytes for weight in self._weights)
        return Rates(
            flops=self._operations / usual["flops"],
            memory=8 * _COPIED / usual["memory"],
            summed=sent / usual["summed"] if count > 1 else 0.0,
            gathered=self._received / statistics.median(self._gathers) if self._gathers else 0.0,
        )

    def _pass_and_step(self) -> None:
        with torch.no_grad():
            self._teacher.advance(0, self._taught, self._ids)
        output = self._student.advance(0, self._entering, self._ids)
        torch.autograd.grad(F.mse_loss(output, self._entering), self._weights)


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
