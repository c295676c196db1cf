"""What enters a student block while it learns: what its predecessors make, or the teacher's states.

With the teacher's states as inputs no block waits for another, and each learns on what it would see
if all the others were perfect (MOHAWK, Bick et al. 2024, arXiv:2408.10189, section 3.2; Puzzle,
Bercovich et al. 2024, arXiv:2411.19146). What it will see in the finished student is something
else, and the errors add up along the chain; "mixed" goes over from the one to the other (scheduled
sampling, Bengio et al. 2015, arXiv:1506.03099).

A skip connection passes states on unchanged, so input and output of every block have to be the
teacher's states in one and the same basis: ``s = U^T h``, with orthonormal columns ``U`` shared by
all levels, and the block's output is read as ``U s + b``.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cleangpt.blocks import State
from cleangpt.errors import UsageError
from cleangpt.sharding import sharded_blocks
from distillation.activations import Activations, state_width
from distillation.batch import Batch
from stitching_layers import StitchingLayers

Basis = Float[Tensor, "d_teacher d_student"]


class StudentInputs:
    """What the frozen blocks before it make of a batch.

    Args:
        activations: Where states come from.
    """

    def __init__(self, activations: Activations) -> None:
        self.activations = activations

    def entering(self, block: int, batch: Batch, progress: float) -> State:
        """What enters a block, 1 or later.

        Args:
            block: Index of the student block.
            batch: The windows.
            progress: The share of its steps that are done, in [0, 1).
        """
        return self.activations.student_input(block, batch)

    def stand_by(self, block: int, batch: Batch) -> None:
        """Take part in what only all processes can do for :meth:`entering`; see ``stages``."""


class TeacherInputs(StudentInputs):
    """The teacher's own state before the blocks that the student block stands for.

    Of a student with more than one stream between its blocks, the others are its own.

    Args:
        activations: Where states come from.
        layer_map: The teacher block of each student block.
        basis: The shared basis; None is the identity, at equal widths.
    """

    def __init__(
        self, activations: Activations, layer_map: Sequence[int], basis: Basis | None
    ) -> None:
        super().__init__(activations)
        self._levels = [block + 1 for block in layer_map[:-1]]
        self._basis = basis
        self._has_other_streams = has_other_streams(activations)

    def entering(self, block: int, batch: Batch, progress: float) -> State:
        """What enters a block, 1 or later."""
        hidden = self.activations.teacher_input(self._levels[block - 1], batch)
        if self._basis is not None:
            with torch.autocast(hidden.device.type, enabled=False):
                hidden = hidden.float() @ self._basis.to(hidden.device)
        if not self._has_other_streams:
            return hidden
        own = self.activations.student_input(block, batch)
        return self.activations.student.with_hidden(own, hidden)

    def stand_by(self, block: int, batch: Batch) -> None:
        """Take part in the teacher's pass."""
        self.activations.stand_by_input(self._levels[block - 1], batch)


class MixedInputs(TeacherInputs):
    """The teacher's state at first, and for more and more windows the student's own.

    Each window goes over once, at a point of the stage that its tokens decide. Without gradients,
    as on held-out data, the student's own enter.
    """

    def entering(self, block: int, batch: Batch, progress: float) -> State:
        """What enters a block, 1 or later."""
        own = self.activations.student_input(block, batch)
        if not torch.is_grad_enabled():
            return own
        moments = [int.from_bytes(key[:8], "big") / 2**64 for key in batch.row_keys]
        taught = [position for position, moment in enumerate(moments) if moment >= progress]
        if not taught:
            super().stand_by(block, batch)  # other processes may have windows that are
            return own
        mixed = own.clone()
        mixed[taught] = super().entering(block, batch, progress)[taught].to(own.dtype)
        return mixed

    def stand_by(self, block: int, batch: Batch) -> None:
        """Take part in the teacher's pass, where there is one."""
        if torch.is_grad_enabled():
            super().stand_by(block, batch)


def has_other_streams(activations: Activations) -> bool:
    """Whether the student's blocks pass on more than their hidden states."""
    return state_width(activations.student) != activations.student.hidden_size


def choose_inputs(
    how: str, activations: Activations, layer_map: Sequence[int], basis: Basis | None
) -> StudentInputs:
    """The inputs that the setting ``block_inputs`` names."""
    if how == "student":
        return StudentInputs(activations)
    kind = {"teacher": TeacherInputs, "mixed": MixedInputs}[how]
    return kind(activations, layer_map, basis)


def check_inputs(how: str, schedule: str, activations: Activations) -> None:
    """Refuse inputs that the student cannot have.

    Raises:
        UsageError: If it is wider than the teacher, or its blocks cannot be decoupled.
    """
    if schedule == "decoupled" and sharded_blocks(activations.teacher.model) is not None:
        raise UsageError(
            "schedule='decoupled' lets each process run the teacher by itself, and this teacher is"
            " spread over all of them.",
            "Choose --schedule sequential, or leave --shard_teacher out.",
        )
    student, teacher = activations.student.hidden_size, activations.teacher.hidden_size
    if how != "student" and student > teacher:
        raise UsageError(
            f"block_inputs={how!r} puts the teacher's states, {teacher} wide, into the student's"
            f" blocks, which are {student} wide: nothing says what the other channels hold.",
            "Choose --block_inputs student, or a student no wider than the teacher.",
        )
    if schedule == "decoupled" and has_other_streams(activations):
        raise UsageError(
            f"The blocks of {type(activations.student.model).__name__} also pass on a stream that"
            " the teacher does not have, so none can learn before those in front of it.",
            "Choose --schedule sequential; --block_inputs teacher works with it.",
        )


@torch.no_grad()
def share_basis(
    stitches: StitchingLayers, basis: Basis | None, means: Sequence[Float[Tensor, " d_teacher"]]
) -> None:
    """Let all stitches read the student's states as the teacher's in one basis, ``U s + b``.

    Args:
        stitches: One per student block; changed in place.
        basis: ``U``; None is the identity, which needs no ``b``.
        means: The teacher's mean state at each stitch's level. What of it lies outside the basis is
            ``b``; stitches without a bias go without.
    """
    for index, stitch in enumerate(stitches):
        projection: nn.Linear = stitch.projection  # type: ignore[assignment]
        if basis is None:
            nn.init.eye_(projection.weight)
            continue
        projection.weight.copy_(basis)
        if projection.bias is not None:
            mean = means[index]
            projection.bias.copy_(mean - basis @ (basis.T @ mean))
