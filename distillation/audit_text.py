"""The audit of a teacher as rows of text, the same for the log and for the report."""

from collections.abc import Sequence
from typing import Any

_NAMED_CHANNELS = 4


def audit_table(
    audit: dict[str, Any], d_student: int
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns, and one row per level.

    Args:
        audit: What :meth:`~distillation.audit.TeacherAudit.to_json` returned.
        d_student: The student's width, at which the floors are given; between two widths of the
            audit they are interpolated.
    """
    columns = (
        "level",
        "RMS",
        "median norm",
        "largest norm",
        "first / other positions",
        "top channel",
        "effective rank",
        f"floor at width {d_student}",
        "raw floor",
        "massive channels",
    )
    return columns, [_row(level, audit["floor_widths"], d_student) for level in audit["levels"]]


def _row(level: dict[str, Any], widths: Sequence[int], d_student: int) -> tuple[str, ...]:
    norms = level["token_norm"]
    return (
        f"block {level['level'] - 1}" if level["level"] else "embeddings",
        _number(level["rms"], ".3g"),
        _number(norms["50 %"], ".3g"),
        _number(norms["max"], ".3g"),
        _number(level["first_position_ratio"], ".3g"),
        _number(level["largest_channel_share"], ".1%"),
        _number(level["effective_rank"], ".1f"),
        f"{floor_at_width(widths, level['rank_floor'], d_student):.4f}",
        f"{floor_at_width(widths, level['raw_rank_floor'], d_student):.4f}",
        _named(level["massive_channels"]),
    )


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def floor_at_width(widths: Sequence[int], floors: Sequence[float], width: int) -> float:
    """The floor at a width; before the first listed one lies width 0 with a floor of 1."""
    below, at_below = 0, 1.0
    for above, at_above in zip(widths, floors, strict=True):
        if width <= above:
            return at_below + (at_above - at_below) * (width - below) / (above - below)
        below, at_below = above, at_above
    return 0.0


def _named(channels: Sequence[int]) -> str:
    names = ", ".join(f"{channel:d}" for channel in channels[:_NAMED_CHANNELS])
    more = len(channels) - _NAMED_CHANNELS
    return f"{names} and {more} more" if more > 0 else names or "none"
