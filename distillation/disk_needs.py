"""How much room a run needs on its disk, counted from shapes before it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cleangpt.blocks import BlockStack
from cleangpt.checkpoints import KEPT
from cleangpt.errors import EnvironmentProblem
from distillation.cache_plan import free_disk, shown_bytes

_ADAM_TENSORS = 2
"""Moments per trained weight; a third copy holds the weights with the best validation loss."""


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes at the run's fullest moment.

    Args:
        checkpoints: All that lie there at a time, the one being written included.
        student: What the run leaves: the student as a file and as a folder, and its stitches.
        states: Frozen states kept in files.
    """

    checkpoints: int
    student: int
    states: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoints + self.student + self.states


def disk_needs(
    teacher: BlockStack,
    student: BlockStack,
    *,
    trains_all: bool,
    states: int,
    keeps_start: bool = False,
) -> DiskNeeds:
    """Count what a run writes.

    Args:
        teacher: The teacher, with or without weights.
        student: The student, with or without weights.
        trains_all: Whether some stage trains the whole student, and not a block or the head alone.
        states: Bytes of frozen states on disk.
        keeps_start: Whether the untrained student is written too.
    """
    weights = _bytes_of(student.model)
    blocks = [_bytes_of(student.block(index)) for index in range(student.num_blocks)]
    stitch = 4 * student.hidden_size * teacher.hidden_size
    head = 4 * student.vocab_size * student.hidden_size
    trained = max(weights - sum(blocks[1:]), *blocks, head) + stitch
    if trains_all:
        trained = weights + len(blocks) * stitch
    checkpoint = weights + len(blocks) * stitch + (_ADAM_TENSORS + 1) * trained
    files = (3 if keeps_start else 2) * (weights + head) + len(blocks) * stitch
    return DiskNeeds((KEPT + 1) * checkpoint, files, states)


def trains_whole_student(schedule: str, freeze_previous: bool) -> bool:
    """Whether the stages of blocks hold the moments of the whole student at a time."""
    return schedule == "parallel_local" or not freeze_previous


def check_disk_room(path: Path, needs: DiskNeeds, *, overwrite: bool = False) -> None:
    """Refuse a run that its disk has no room for, before the hours it would take to find out.

    Args:
        path: The run's directory. Checkpoints that are there count as free: new ones replace them.
        needs: What the run will write.
        overwrite: Whether everything there is replaced.

    Raises:
        EnvironmentProblem: With all the numbers.
    """
    replaced = path.glob("**/*" if overwrite else "checkpoints/*/*")
    there = sum(file.stat().st_size for file in replaced if file.is_file())
    free = free_disk(path) + there
    if needs.total <= free:
        return
    parts = f"{shown_bytes(needs.checkpoints)} checkpoints, {shown_bytes(needs.student)} student"
    states = f", {shown_bytes(needs.states)} frozen states" if needs.states else ""
    less = ", or keep no states there (--activation_cache ram or off)" if needs.states else ""
    raise EnvironmentProblem(
        f"The run needs about {shown_bytes(needs.total)} on the disk of {path} ({parts}{states}),"
        f" and {shown_bytes(free)} are free.",
        f"Free some space, choose another --output_dir{less}.",
    )


def _bytes_of(module: Any) -> int:
    """The bytes a checkpoint of it has: shared tensors are written under each of their names."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())
