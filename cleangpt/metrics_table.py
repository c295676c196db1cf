"""A run's curves as points: what ``metrics.csv`` and the trackers take from ``metrics.jsonl``."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cleangpt.disk_errors import disk_errors_explained

VALUES = ("loss", "gradient_norm", "learning_rate", "tokens_per_second")
COLUMNS = ("stage", "event", "at", *VALUES)
_PLACES = {"step": "step", "epoch": "epoch", "validation": "epochs_done"}
"""The events that make curves, and what each counts."""


@dataclass(frozen=True)
class CurvePoint:
    """One point of each curve of a stage.

    Args:
        stage: Whose curves.
        event: "step" (optimizer steps), "epoch" (an epoch's mean) or "validation".
        at: The step (from 1), the epoch (from 0), or how many epochs were done.
        values: The numbers by name; None where one was not finite.
    """

    stage: str
    event: str
    at: int
    values: dict[str, float | None]

    def named(self) -> dict[str, float]:
        """The finite numbers, by names of which no two curves of a stage share one."""
        kind = "" if self.event == "step" else f"{self.event}_"
        return {f"{kind}{name}": v for name, v in self.values.items() if v is not None}


def curve_point(record: dict[str, Any]) -> CurvePoint | None:
    """The point that an event of ``metrics.jsonl`` adds; None if it is not part of a curve."""
    place = _PLACES.get(record["event"])
    if place is None or not {"stage", place} <= record.keys():
        return None
    values = {name: record[name] for name in VALUES if name in record}
    return CurvePoint(record["stage"], record["event"], record[place], values)


class MetricsTable:
    """``metrics.csv``: a row for each step, epoch or validation that was written down.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append the event's row, if it has one."""
        point = curve_point(record)
        if point is not None:
            with disk_errors_explained(self.path):
                is_new = not self.path.is_file()
                with self.path.open("a", encoding="utf-8", newline="") as file:
                    rows = csv.writer(file, lineterminator="\n")
                    if is_new:
                        rows.writerow(COLUMNS)
                    # None becomes an empty field.
                    values = [point.values.get(name) for name in VALUES]
                    rows.writerow([point.stage, point.event, point.at, *values])

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        """Begin again with these events."""
        self.path.unlink(missing_ok=True)
        for record in records:
            self.write(record)
