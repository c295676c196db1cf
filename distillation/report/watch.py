"""A run that goes on, followed in the terminal through the files it writes.

Nothing but the run's directory is read, so it works beside the run, over ssh, and on a shared disk.
On a terminal a few lines are drawn over; anywhere else one line is printed per look. It ends when
the run does.
"""

import itertools
import math
import shutil
import sys
import time
from pathlib import Path

from cleangpt.errors import InputError
from cleangpt.metrics_log import format_seconds
from cleangpt.safe_text import clean_line, clean_message
from distillation.report.run_files import (
    Curve,
    Run,
    group,
    is_count,
    is_run,
    number,
    numbers,
    read_run,
)
from distillation.report.svg import short_number

SPARKS = "".join(chr(0x2581 + index) for index in range(8))
PLAIN_SPARKS = "_.-=*#"
RUNNING = "running"
STALE_SECONDS = 300.0
"""How long a run may write nothing before that is said."""


def watch(run_dir: Path, interval: float) -> None:
    """Show the run until it ends.

    Args:
        run_dir: Its directory; a run that has not begun there is waited for.
        interval: Seconds between two looks.

    Raises:
        InputError: If there is no such folder.
    """
    if not run_dir.is_dir():
        raise InputError(
            f"{run_dir} is not a folder, so there is no run to follow.",
            "Name what --output_dir of the training names.",
        )
    view = View()
    while not is_run(run_dir):
        view.show([f"{clean_line(str(run_dir))}: waiting for a run to begin"])
        time.sleep(interval)
    meter = Meter()
    while True:
        run = read_run(run_dir)
        ended = run.status != RUNNING
        view.show(lines_of(run, meter, view.width, view.sparks), is_last=ended)
        if ended:
            return
        time.sleep(interval)


class Meter:
    """Steps per second of the whole run, from what was seen: its files hold no times."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []
        self.changed_at = time.monotonic()

    def take(self, done: int) -> float:
        """Take in the steps done by now, and return steps per second; NaN before there is one."""
        now = time.monotonic()
        if not self._seen or done != self._seen[-1][1]:
            self._seen = [*self._seen[-20:], (now, done)]
            self.changed_at = now
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last - first) / (ended - began) if last > first and ended > began else math.nan

    def silent_for(self) -> float:
        """Seconds since the last change."""
        return time.monotonic() - self.changed_at


class View:
    """Lines on standard output: drawn over on a terminal, a line per look anywhere else."""

    def __init__(self) -> None:
        self._out = out = sys.stdout
        self._drawn = 0
        self._last = ""
        self.is_terminal = out.isatty()
        encoding = (getattr(out, "encoding", None) or "ascii").lower()
        self.sparks = SPARKS if encoding.startswith("utf") else PLAIN_SPARKS

    @property
    def width(self) -> int:
        """Columns there are."""
        return shutil.get_terminal_size().columns if self.is_terminal else 400

    def show(self, lines: list[str], is_last: bool = False) -> None:
        """Show these lines in place of those before; elsewhere the first, if it is news."""
        if self.is_terminal:
            back = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
            cut = [line[: max(10, self.width - 1)] for line in lines]
            self._out.write(back + "\n".join(cut) + "\n")
            self._drawn = len(cut)
        elif lines[0] != self._last or is_last:
            self._out.write(lines[0] + "\n")
            self._last = lines[0]
        self._out.flush()


def lines_of(run: Run, meter: Meter, width: int, sparks: str = SPARKS) -> list[str]:
    """What there is to say: a line that stands alone, and more for a terminal.

    Args:
        run: The run as it is now.
        meter: What was seen of it before.
        width: Columns of the terminal.
        sparks: Characters of a rising line.
    """
    done, total = steps_done(run), steps_in_all(run)
    rate = meter.take(done)
    share = f"{done:,}/{total:,.0f} steps" if math.isfinite(total) else f"{done:,} steps"
    parts = [run.name, run.status, share]
    current = _current(run)
    if run.status != RUNNING:
        seconds = number(group(run.manifest.get("results")).get("seconds"))
        parts += [f"{format_seconds(seconds)} in all"] if math.isfinite(seconds) else []
        parts += [str(run.manifest["reason"])] if run.manifest.get("reason") else []
    elif current is not None:
        parts += [_stage_words(current)]
        if math.isfinite(rate):
            parts.append(f"{rate:.2f} steps/s")
            if math.isfinite(total):
                parts.append(f"ETA {format_seconds((total - done) / rate)}")
    else:
        parts.append("between stages" if run.curves else "starting")
    if run.status == RUNNING and meter.silent_for() > STALE_SECONDS:
        parts.append(f"nothing new for {format_seconds(meter.silent_for())}")
    lines = [clean_line(", ".join(parts), 400)]
    if math.isfinite(total) and total > 0:
        lines.append(_bar(done / total, min(60, width - 8), sparks))
    lines += [_stage_line(curve, width, sparks) for curve in run.curves[-12:]]
    if run.status == "done":
        lines.append(f"report: python -m distillation.report {clean_line(str(run.path))}")
    return lines


def steps_done(run: Run) -> int:
    """Steps of all stages; of blocks that learn together, those of one."""
    blocks = [_steps(curve) for curve in run.curves if curve.stage.startswith("block-")]
    others = sum(_steps(curve) for curve in run.curves if not curve.stage.startswith("block-"))
    together = run.settings.get("schedule") == "parallel_local"
    return others + (max([0, *blocks]) if together else sum(blocks))


def steps_in_all(run: Run) -> float:
    """Steps of the whole run; NaN if its files do not tell.

    The run's own total leaves out blocks that learn apart, which are no part of its journal.
    """
    total = number(run.manifest.get("total_steps"))
    if run.settings.get("schedule") != "decoupled":
        return total
    config, epochs = group(run.manifest.get("student_config")), run.settings.get("epochs_per_block")
    blocks = number(config.get("n_layer", config.get("num_hidden_layers")))
    batches = number(group(run.manifest.get("data")).get("batches"))
    each = batches / max(1.0, number(run.settings.get("gradient_accumulation_steps")))
    counted = sum(numbers(epochs)) if isinstance(epochs, list) else blocks * number(epochs)
    return total + counted * math.ceil(each) if math.isfinite(each) else math.nan


def _steps(curve: Curve) -> int:
    steps = curve.row.get("steps")
    if is_count(steps):
        return int(curve.row["steps"])
    return curve.steps[-1][0] if curve.steps else 0


def _current(run: Run) -> Curve | None:
    """The stage that goes on: the last one that is not done."""
    going = [curve for curve in run.curves if not curve.row]
    return going[-1] if going else None


def _stage_words(curve: Curve) -> str:
    words = f"{curve.stage} step {_steps(curve):,}: loss {short_number(curve.newest)}"
    if math.isfinite(curve.tokens_per_second):
        words += f", {curve.tokens_per_second:,.0f} tokens/s"
    return words


def _stage_line(curve: Curve, width: int, sparks: str) -> str:
    losses = [loss for _, loss in curve.steps if math.isfinite(loss)] or curve.epochs
    line = sparkline(losses, max(8, min(32, width - 60)), sparks)
    mark = "done" if curve.row else "now"
    words = f"{curve.stage:10.10} {mark:4} {_steps(curve):>7,} steps  loss"
    return clean_message(f"{words} {short_number(curve.newest):>8}", 100) + f"  {line}"


def sparkline(values: list[float], width: int, sparks: str = SPARKS) -> str:
    """Values as one row of characters, the newest to the right; means where they do not fit.

    Example:
        >>> sparkline([3.0, 2.0, 1.0], 10, "_-=")
        '=-_'
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    cuts = [index * len(finite) // count for index in range(count + 1)]
    parts = [finite[begin:end] for begin, end in itertools.pairwise(cuts)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    room = high - low or 1.0
    return "".join(sparks[round((mean - low) / room * (len(sparks) - 1))] for mean in means)


def _bar(share: float, width: int, sparks: str) -> str:
    full, empty = (sparks[-1], "\N{LIGHT SHADE}") if sparks == SPARKS else ("#", ".")
    filled = round(min(1.0, max(0.0, share)) * max(1, width))
    return full * filled + empty * (max(1, width) - filled) + f" {share:4.0%}"
