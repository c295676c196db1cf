"""Which teacher block each student block learns from."""

import itertools
from collections.abc import Sequence
from typing import Final

from cleangpt.errors import UsageError

LAYER_MAPS: Final = ("uniform", "first", "last")
MEASURED: Final = "measured"
"""For the command: the map that :func:`measured_layer_map` finds on its data."""
LayerMap = str | Sequence[int]
"""A name of ``LAYER_MAPS``, or the teacher block of each student block, never falling."""


def choose_layer_map(wanted: LayerMap, student_blocks: int, teacher_blocks: int) -> tuple[int, ...]:
    """The teacher block of each student block, counted from 0.

    "uniform" spreads the teacher's blocks evenly, last to last, so that a student block stands for
    several of them where the student is shallower; "first" takes as many as there are from the
    bottom, "last" from the top. Where the student is deeper, several of its blocks learn from one
    of the teacher's, each from where the one before it has come: all alike in "uniform", those
    left over from the top one in "first", from the bottom one in "last".

    Args:
        wanted: One of these names, or the map itself.
        student_blocks: How many blocks the student has.
        teacher_blocks: How many blocks the teacher has.

    Raises:
        UsageError: If a map of one's own does not have one entry per student block, none below the
            one before it, each a block of the teacher.

    Example:
        >>> choose_layer_map("uniform", 2, 6), choose_layer_map("first", 2, 6)
        ((2, 5), (0, 1))
        >>> choose_layer_map([1, 5], 2, 6), choose_layer_map([0, 0, 1], 3, 2)
        ((1, 5), (0, 0, 1))
    """
    uniform = uniform_layer_map(student_blocks, teacher_blocks)
    if wanted == "uniform":
        return uniform
    if wanted == "first":
        return tuple(min(m, teacher_blocks - 1) for m in range(student_blocks))
    if wanted == "last":
        return tuple(max(0, teacher_blocks - student_blocks + m) for m in range(student_blocks))
    chosen = tuple(int(block) for block in wanted)
    problems = []
    if len(chosen) != student_blocks:
        problems.append(f"it has {len(chosen)} entries for {student_blocks} student blocks")
    outside = sorted({block for block in chosen if block not in range(teacher_blocks)}, key=str)
    if outside:
        known = f"0 to {teacher_blocks - 1}"
        problems.append(f"the teacher's blocks are {known}, and it names {outside}")
    falls = [f"{one} to {other}" for one, other in itertools.pairwise(chosen) if one > other]
    if falls and not outside:
        problems.append(f"it falls from {falls[0]}")
    if problems:
        raise UsageError(
            f"The layer map {list(chosen)} does not fit: {'; '.join(problems)}.",
            "Give one entry per student block that is no lower than the one before it, such as"
            f" {','.join(map(str, uniform))} (--layer_map), which is uniform.",
        )
    return chosen


def uniform_layer_map(student_blocks: int, teacher_blocks: int) -> tuple[int, ...]:
    """Spread the teacher's blocks evenly over the student's, last to last.

    Student block m (from 0) of S learns from teacher block ``round((m + 1) * T / S) - 1`` of T,
    halves up: the identity for equal depths. A deeper student's learns from the one that lies
    beside its middle, ``floor((m + 1/2) * T / S)``, so that every teacher block teaches as many
    student blocks as any other, give or take one.

    Raises:
        UsageError: If one of them has no blocks.

    Example:
        >>> uniform_layer_map(2, 6), uniform_layer_map(5, 3)
        ((2, 5), (0, 0, 1, 2, 2))
    """
    if student_blocks < 1 or teacher_blocks < 1:
        raise UsageError(
            f"The student has {student_blocks} blocks and the teacher {teacher_blocks};"
            " each needs one at least.",
            "Choose n_layer >= 1.",
        )
    # Integer arithmetic: round() would go to even at the halves.
    if student_blocks > teacher_blocks:
        return tuple(
            (2 * m + 1) * teacher_blocks // (2 * student_blocks) for m in range(student_blocks)
        )
    return tuple(
        (2 * (m + 1) * teacher_blocks + student_blocks) // (2 * student_blocks) - 1
        for m in range(student_blocks)
    )


def measured_layer_map(costs: Sequence[float], student_blocks: int) -> tuple[int, ...]:
    """The map of a student that is made of the blocks which the teacher can least do without.

    A student block starts from the first teacher block that it stands for
    (:func:`~distillation.teacher_init.first_of_groups`), so each of those blocks begins a group.
    The first is always one of them.

    Args:
        costs: What the teacher loses without each of its blocks; see
            :func:`~distillation.block_costs.block_costs`.
        student_blocks: How many blocks the student has; of a deeper one the map is uniform.

    Example:
        >>> measured_layer_map([7.0, 0.1, 0.2, 3.0, 0.1, 2.0], 3)
        (2, 4, 5)
    """
    count = len(costs)
    if student_blocks >= count:
        return uniform_layer_map(student_blocks, count)
    dearest = sorted(range(1, count), key=lambda block: (-costs[block], block))
    starts = sorted(dearest[: student_blocks - 1])
    return (*(block - 1 for block in starts), count - 1)


def standing_in(wanted: LayerMap) -> LayerMap:
    """The map of a plan or the doctor, which measure nothing: uniform for one to be found."""
    return "uniform" if wanted == MEASURED else wanted


def choose_blocks(wanted: Sequence[int] | None, student_blocks: int) -> frozenset[int]:
    """The student blocks that learn; None is all of them.

    Raises:
        UsageError: If there are none, one that the student does not have, or one twice.
    """
    if wanted is None:
        return frozenset(range(student_blocks))
    outside = sorted({block for block in wanted if block not in range(student_blocks)}, key=str)
    twice = sorted({block for block in wanted if list(wanted).count(block) > 1})
    if outside or twice or not wanted:
        found = f"names {outside}" if outside else f"names {twice} twice" if twice else "names none"
        raise UsageError(
            f"The student's blocks are 0 to {student_blocks - 1}; blocks={list(wanted)} {found}.",
            "Name blocks of the student, such as 0-2,5 (--blocks), or leave it out for all.",
        )
    return frozenset(wanted)
