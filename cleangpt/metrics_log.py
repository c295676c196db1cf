"""What a run tells while it goes on: metrics.jsonl for programs, log lines and a bar for people."""

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from tqdm.auto import tqdm

from cleangpt.disk_errors import disk_errors_explained
from cleangpt.integrity import file_digest, parse_json_object
from cleangpt.metrics_table import MetricsTable

logger = logging.getLogger(__name__)


class LogFollower(Protocol):
    """What is told of every event that a log has written."""

    def write(self, record: dict[str, Any]) -> None:
        """Take in one event."""

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        """Begin again with these: what came after them is taken back."""


class MetricsLog:
    """Appends one JSON object per event to ``metrics.jsonl``, and its curves to ``metrics.csv``.

    Numbers that are not finite are written as null, and their names are listed under "nonfinite":
    JSON has no NaN, and a reader must not mistake one for zero.

    Args:
        path: The file to append to; None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._is_paused = False
        self.followers: list[LogFollower] = []
        if path is not None:
            self.followers.append(MetricsTable(path.with_suffix(".csv")))

    def write(self, event: str, **values: Any) -> None:
        """Append one event; each line is complete, so a killed run leaves a readable file."""
        if self.path is None or self._is_paused:
            return
        record: dict[str, Any] = {"event": event, **without_nonfinite(values)}
        nonfinite = [name for name in values if record[name] is None and values[name] is not None]
        if nonfinite:
            record["nonfinite"] = nonfinite
        with (
            disk_errors_explained(self.path),
            self.path.open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(record, allow_nan=False) + "\n")
        for follower in self.followers:
            follower.write(record)

    def records(self) -> list[dict[str, Any]]:
        """The events written so far, without lines that are none."""
        text = b"" if self.size() == 0 or self.path is None else self.path.read_bytes()
        found = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                record = parse_json_object(line)
                if "event" in record:
                    found.append(record)
        return found

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path is not None and self.path.is_file() else 0

    def take_in(self, other: "MetricsLog") -> None:
        """Append what another one wrote."""
        if self.path is None or self._is_paused or other.size() == 0:
            return
        assert other.path is not None
        with self.path.open("ab") as file:
            file.write(other.path.read_bytes())
        for record in other.records():
            for follower in self.followers:
                follower.write(record)

    def pause(self) -> None:
        """Write nothing for now: what comes has been written before."""
        self._is_paused = True

    def checksum(self, size: int) -> str:
        """SHA-256 (hex) of the first ``size`` bytes."""
        if self.path is None or not self.path.is_file():
            return hashlib.sha256().hexdigest()
        return file_digest(self.path, size)

    def go_on(self, size: int, checksum: str | None = None) -> None:
        """Write again, after the first ``size`` bytes; what a stopped run wrote later goes.

        Args:
            size: Where the run was when it was saved.
            checksum: Of what it had written by then; a difference is a warning, since no weight
                depends on it.
        """
        self._is_paused = False
        if self.path is None:
            return
        if checksum is not None and checksum != self.checksum(size):
            logger.warning(
                "%s is not what the run wrote before it stopped; the lines up to there cannot be"
                " trusted.",
                self.path,
            )
        if self.path.is_file():
            os.truncate(self.path, min(size, self.size()))
        for follower in self.followers:
            follower.rewrite(self.records())


def without_nonfinite(value: Any) -> Any:
    """The same value for JSON, which knows neither NaN nor infinity: they become None."""
    if isinstance(value, dict):
        return {name: without_nonfinite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunProgress:
    """The progress bar of one stage, with the time left for the stage and for the whole run.

    Where there is neither a terminal nor a notebook, one line per logged step takes its place.

    Args:
        num_stages: Stages of the run.
        show: Whether to draw bars; None draws them on a terminal and in a notebook.
        planned: Seconds that each stage was planned to take, by name, to tell from those that ran
            how long the others will; empty takes all stages for equally long.
    """

    def __init__(
        self,
        num_stages: int,
        show: bool | None = None,
        planned: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._show = (sys.stderr.isatty() or "ipykernel" in sys.modules) if show is None else show
        self._num_stages = num_stages
        self._stages_done = 0
        self._planned = planned
        self._left = sum(planned.values()) or float(num_stages)  # as planned
        self._bar: Any = None
        self._name = ""
        self._total_steps = 0
        self._done = 0
        self._started_at = 0.0
        self._share = 0.0  # of what is open, as planned
        self._known = (0.0, 0.0)  # of what ended: as planned, and in truth

    def start_stages(
        self, name: str, stages: Sequence[str], total_steps: int, done: int = 0
    ) -> None:
        """Open the bar of one stage, or of several at once.

        Args:
            name: Of all of them.
            stages: The name of each.
            total_steps: Optimizer steps of them all.
            done: Of those, what was done before the run stopped.
        """
        first, last = self._stages_done + 1, self._stages_done + len(stages)
        numbers = f"{first}" if first == last else f"{first}-{last}"
        self._name = f"{name} ({numbers}/{self._num_stages})"
        self._share = self._take(stages) * (1 - done / max(1, total_steps))
        self._total_steps = total_steps
        self._done = done
        self._started_at = time.perf_counter()
        self._bar = tqdm(
            total=total_steps,
            initial=done,
            desc=self._name,
            unit="step",
            disable=not self._show,
            leave=False,
            dynamic_ncols=True,
        )

    def advance(self, steps: int = 1) -> None:
        """Count optimizer steps."""
        self._bar.update(steps)

    def skip_stages(self, stages: Sequence[str]) -> None:
        """Count stages that were done before, or elsewhere."""
        self._take(stages)

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Tell the numbers of ``step`` (from 1), beside the bar or as a line."""
        elapsed = time.perf_counter() - self._started_at
        stage_left = elapsed / max(1, step - self._done) * (self._total_steps - step)
        run_left = format_seconds(stage_left + self._later_seconds(elapsed + stage_left))
        numbers = f"loss {loss:.4g}, {tokens_per_second:,.0f} tokens/s"
        self._bar.set_postfix_str(f"{numbers}, run {run_left} left")
        if not self._show:
            logger.info(
                "%s step %d/%d: %s, left %s here, %s in all",
                self._name,
                step,
                self._total_steps,
                numbers,
                format_seconds(stage_left),
                run_left,
            )

    def end_stages(self) -> None:
        """Close the bar."""
        planned, took = self._known
        self._known = (planned + self._share, took + time.perf_counter() - self._started_at)
        self._bar.close()

    def _take(self, stages: Sequence[str]) -> float:
        """Count stages as begun; return what of the plan they are."""
        weights = (self._planned.get(name, 0.0) if self._planned else 1.0 for name in stages)
        share = sum(weights, start=0.0)
        self._stages_done += len(stages)
        self._left = max(0.0, self._left - share)
        return share

    def _later_seconds(self, these: float) -> float:
        """Expected time of what is not begun: as planned, and as much slower as what is known."""
        planned, took = self._known[0] + self._share, self._known[1] + these
        return self._left * took / planned if planned else self._left


def format_seconds(seconds: float) -> str:
    """Return ``seconds`` as ``1:02:03`` or ``02:03``."""
    return str(tqdm.format_interval(max(0.0, seconds)))
