"""Which teacher block each student block learns from."""

from cleangpt.errors import UsageError


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
