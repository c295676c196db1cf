"""How far each student block is from the teacher block it was taught by.

Both sides are raw block outputs, before the final norm, read through ``BlockStack``. The student's
goes through its stitching layer first. This file fits a stitch by least squares where a run saved
none, and never trains anything.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cleangpt.blocks import BlockStack
from distillation.evaluation.results import BlockError
from distillation.evaluation.scoring_windows import WindowBatch
from distillation.least_squares import LeastSquares

Stitch = Callable[[Tensor], Tensor]
BlockPairs = list[tuple[Tensor, Tensor]]


@dataclass
class ErrorSums:
    """Running sums over positions, in float64 on the CPU: Apple's GPUs have no float64."""

    num_positions: int = 0
    squared_error: float = 0.0
    cosine: float = 0.0
    target_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    target_squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(
        self,
        student: Float[Tensor, "positions d_teacher"],
        teacher: Float[Tensor, "positions d_teacher"],
    ) -> None:
        """Add positions whose student side is already stitched."""
        student, teacher = student.cpu().double(), teacher.cpu().double()
        self.num_positions += len(teacher)
        self.squared_error += (student - teacher).square().sum().item()
        self.cosine += F.cosine_similarity(student, teacher, dim=-1).sum().item()
        self.target_sum = self.target_sum + teacher.sum(0)
        self.target_squares = self.target_squares + teacher.square().sum(0)

    def result(self, student_block: int, teacher_block: int) -> BlockError:
        """Return the errors; relative to the teacher's mean per channel."""
        count = max(self.num_positions, 1)
        variance_sum = (self.target_squares - self.target_sum.square() / count).sum().item()
        relative = self.squared_error / variance_sum if variance_sum > 0 else float("nan")
        if self.squared_error == 0.0:
            relative = 0.0
        return BlockError(
            student_block=student_block,
            teacher_block=teacher_block,
            mse=self.squared_error / (count * max(self.target_sum.numel(), 1)),
            relative_error=relative,
            local_error=None,
            cosine=self.cosine / count,
        )


@torch.no_grad()
def block_pairs(
    student: BlockStack, teacher: BlockStack, layer_map: Sequence[int], batch: WindowBatch
) -> BlockPairs:
    """Return (student, teacher) states per student block at the positions that count.

    Positions are those scored, so where windows overlap none is counted twice.
    """
    own, theirs = _states(student, batch), _states(teacher, batch)
    return [
        (own[index + 1][batch.scored], theirs[teacher_block + 1][batch.scored])
        for index, teacher_block in enumerate(layer_map)
    ]


def _states(stack: BlockStack, batch: WindowBatch) -> list[Tensor]:
    states = stack.block_hidden_states(
        batch.input_ids.to(stack.device), batch.valid.long().to(stack.device)
    )
    return [state.float().cpu() for state in states]


@torch.no_grad()
def measure_blocks(
    pairs: Iterable[BlockPairs], layer_map: Sequence[int], stitches: Sequence[Stitch]
) -> tuple[list[BlockError], int]:
    """Return the error of every block through its stitch, and the positions measured."""
    sums = [ErrorSums() for _ in layer_map]
    for batch_pairs in pairs:
        for block_sums, stitch, (own, theirs) in zip(sums, stitches, batch_pairs, strict=True):
            block_sums.add(stitch(own), theirs)
    blocks = [
        block_sums.result(index, teacher_block)
        for index, (block_sums, teacher_block) in enumerate(zip(sums, layer_map, strict=True))
    ]
    return blocks, sums[0].num_positions if sums else 0


@torch.no_grad()
def fit_stitches(pairs: Iterable[BlockPairs], num_blocks: int) -> list[Stitch]:
    """Return the least-squares stitch of every block, which works in float64 on the CPU."""
    sums = [LeastSquares() for _ in range(num_blocks)]
    for batch_pairs in pairs:
        for own_sums, (own, theirs) in zip(sums, batch_pairs, strict=True):
            own_sums.add(own, theirs)
    return [_affine(*own_sums.regression()) for own_sums in sums]


def _affine(weight: Tensor, bias: Tensor) -> Stitch:
    return lambda student: F.linear(student.cpu().double(), weight, bias)
