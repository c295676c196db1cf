"""Which teacher block each student block learns from."""

import itertools
from collections.abc import Sequence
from typing import Final

from cleangpt.errors import UsageError

LAYER_MAPS: Final = ("uniform", "first", "last")
LayerMap = str | Sequence[int]
"""A name of ``LAYER_MAPS``, or the teacher block of each student block, rising."""


def choose_layer_map(wanted: LayerMap, student_blocks: int, teacher_blocks: int) -> tuple[int, ...]:
    """The teacher block of each student block, counted from 0.

    "uniform" spreads the teacher's blocks evenly, last to last, so that a student block stands for
    several of them where the student is shallower; "first" takes as many as there are from the
    bottom, "last" from the top.

    Args:
        wanted: One of these names, or the map itself.
        student_blocks: How many blocks the student has.
        teacher_blocks: How many blocks the teacher has.

    Raises:
        UsageError: If the student is deeper than the teacher, or a map of one's own does not have
            one entry per student block, rising, each a block of the teacher.

    Example:
        >>> choose_layer_map("uniform", 2, 6), choose_layer_map("first", 2, 6)
        ((2, 5), (0, 1))
        >>> choose_layer_map([1, 5], 2, 6)
        (1, 5)
    """
    uniform = uniform_layer_map(student_blocks, teacher_blocks)
    if wanted == "uniform":
        return uniform
    if wanted == "first":
        return tuple(range(student_blocks))
    if wanted == "last":
        return tuple(range(teacher_blocks - student_blocks, teacher_blocks))
    chosen = tuple(int(block) for block in wanted)
    problems = []
    if len(chosen) != student_blocks:
        problems.append(f"it has {len(chosen)} entries for {student_blocks} student blocks")
    outside = sorted({block for block in chosen if block not in range(teacher_blocks)}, key=str)
    if outside:
        known = f"0 to {teacher_blocks - 1}"
        problems.append(f"the teacher's blocks are {known}, and it names {outside}")
    elif any(one >= other for one, other in itertools.pairwise(chosen)):
        problems.append("its entries do not rise")
    if problems:
        raise UsageError(
            f"The layer map {list(chosen)} does not fit: {'; '.join(problems)}.",
            f"Give one rising entry per student block, such as {','.join(map(str, uniform))}"
            " (--layer_map), which is uniform.",
        )
    return chosen


def uniform_layer_map(student_blocks: int, teacher_blocks: int) -> tuple[int, ...]:
    """Spread the teacher's blocks evenly over the student's, last to last.

    Student block m (from 0) learns from teacher block ``round((m + 1) * T / S) - 1``, halves up:
    the identity for equal depths.

    Raises:
        UsageError: If the student is deeper than the teacher.

    Example:
        >>> uniform_layer_map(2, 6)
        (2, 5)
    """
    if not 1 <= student_blocks <= teacher_blocks:
        raise UsageError(
            f"The student has {student_blocks} blocks and the teacher {teacher_blocks};"
            " each student block needs a teacher block of its own.",
            f"Choose n_layer between 1 and {teacher_blocks}.",
        )
    # Integer arithmetic: round() would go to even at the halves.
    return tuple(
        (2 * (m + 1) * teacher_blocks + student_blocks) // (2 * student_blocks) - 1
        for m in range(student_blocks)
    )


def choose_blocks(wanted: Sequence[int] | None, student_blocks: int) -> frozenset[int]:
    """The student blocks that learn; None is all of them.

    Raises:
        UsageError: If there are none, or one that the student does not have.
    """
    if wanted is None:
        return frozenset(range(student_blocks))
    outside = sorted({block for block in wanted if block not in range(student_blocks)}, key=str)
    if outside or not wanted:
        found = f"names {outside}" if outside else "names none"
        raise UsageError(
            f"The student's blocks are 0 to {student_blocks - 1}; blocks={list(wanted)} {found}.",
            "Name blocks of the student, such as 0-2,5 (--blocks), or leave it out for all.",
        )
    return frozenset(wanted)
