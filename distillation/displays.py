"""How results look in a notebook and in a terminal: tables, and a curve of the losses.

What is shown stays what it is: a dictionary, a plan. Every text is escaped, no script is used, and
a file that is gone or damaged leaves the picture out.
"""

import html
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cleangpt.errors import CheckpointError
from cleangpt.integrity import parse_json_object
from cleangpt.manifest import read_manifest
from cleangpt.metrics_log import format_seconds
from cleangpt.safe_text import clean_line

if TYPE_CHECKING:
    from cleangpt.blocks import BlockStack
    from distillation.distillation_trainer import DistillationTrainer

COLUMNS = ("stage", "first loss", "best", "last", "relative error", "seconds", "verdict")
WIDTH, HEIGHT, MARGIN = 720.0, 220.0, 40.0
MAX_POINTS = 200
MAX_METRICS_BYTES = 50_000_000

Points = list[tuple[float, float]]


class TrainingResults(dict[str, Any]):
    """What :meth:`DistillationTrainer.train` returns: a dictionary that shows itself as a table."""

    def __repr__(self) -> str:
        """A headline, the stages as a table, and the keys."""
        rows = _rows(self)
        return "\n".join([_headline(self), _aligned(COLUMNS, rows), f"keys: {', '.join(self)}"])

    def _repr_html_(self) -> str:
        curve = loss_curve(_losses(self))
        return f"<p>{_text(_headline(self))}</p>{curve}{html_table(COLUMNS, _rows(self))}"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML, every cell escaped."""
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(c)}</td>' for c in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def loss_curve(losses: Mapping[str, Points]) -> str:
    """An SVG picture of the losses, one line per stage beside the one before it.

    The vertical axis is logarithmic where all losses are positive. Colours are those of the text
    around it, so it can be read on any background.

    Args:
        losses: By stage, points of (step, loss).

    Returns:
        The picture; empty if there is no point.
    """
    shown = {name: thinned(points) for name, points in losses.items() if points}
    values = [loss for points in shown.values() for _, loss in points]
    if not values:
        return ""
    is_log = min(values) > 0
    low, high = min(values), max(values)
    ends = list(accumulate(max(step for step, _ in points) for points in shown.values()))
    right = (WIDTH - 2 * MARGIN) / (ends[-1] or 1.0)  # a file may have step 0 alone

    def place(start: float, step: float, loss: float) -> str:
        parts = [math.log(v) if is_log else v for v in (loss, low, high)]
        up = (parts[0] - parts[1]) / (parts[2] - parts[1] or 1.0)
        across, down = MARGIN + (start + step) * right, HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)
        return f"{across:.1f},{down:.1f}"

    parts = [_line(MARGIN, HEIGHT - MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN)]
    for start, (name, points) in zip([0.0, *ends], shown.items(), strict=False):
        line = " ".join(place(start, *point) for point in points)
        middle = MARGIN + (start + max(step for step, _ in points) / 2) * right
        parts += [
            f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>',
            _label(middle, HEIGHT - MARGIN + 16, name.replace("block-", ""), "middle"),
            _line(MARGIN + start * right, MARGIN, MARGIN + start * right, HEIGHT - MARGIN, 0.2),
        ]
    parts += [
        _label(MARGIN, MARGIN - 10, f"loss {high:.4g}", "start"),
        _label(MARGIN - 4, HEIGHT - MARGIN, f"{low:.3g}", "end"),
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" width="100%" style="max-width:{WIDTH:g}px"'
        f' role="img" aria-label="loss of each stage by step" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(parts)}</svg>"
    )


def thinned(points: Points) -> Points:
    """At most ``MAX_POINTS`` of them, the first and the last among these."""
    every = math.ceil(len(points) / MAX_POINTS)
    return [*points[:-1:every], points[-1]]


def shown_trainer(trainer: "DistillationTrainer") -> str:
    """What a trainer is about to do, or has done: models, stages, data and the state of its run."""
    backbone, logit = trainer.backbone_trainer, trainer.head_trainer.config
    config = backbone.config
    stitched = "through stitches" if backbone.is_stitched else "without stitches"
    lines = {
        "teacher": _shown_model(backbone.teacher),
        "student": _shown_model(backbone.student),
        "blocks": f"{config.schedule}, {config.distill_loss_type} {stitched},"
        f" student -> teacher {dict(enumerate(backbone.layer_map))}",
        "head": f"{logit.logit_loss_type} at temperature {logit.logit_loss_temperature:g}",
        "run": f"{clean_line(str(trainer.run.path))} ({_state(trainer)})",
    }
    shown = "\n".join(f"  {name:8} {line}" for name, line in lines.items())
    return f"{type(trainer).__name__}\n{shown}"


def _state(trainer: Any) -> str:
    try:
        manifest = read_manifest(trainer.run.path)
    except CheckpointError:
        return "its manifest is damaged"
    return "new" if manifest is None else clean_line(str(manifest.get("status")))


def _shown_model(stack: "BlockStack") -> str:
    from cleangpt.structure import count_parameters  # only here: a report needs no torch

    parameters = count_parameters(stack.model)
    return (
        f"{type(stack.model).__name__}, {stack.num_blocks} blocks x {stack.hidden_size},"
        f" vocabulary {stack.vocab_size:,}, {parameters:,} parameters"
    )


def _stages(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    later = (results.get(name) for name in ("head", "polish"))
    return [*results.get("blocks", ()), *(row for row in later if row)]


def _rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            str(row["stage"]),
            *(_number(row[key]) for key in ("first_loss", "best_loss", "last_loss")),
            _number(row.get("relative_error")),
            f"{row['seconds']:.1f}",
            str(row.get("verdict", "")),
        )
        for row in _stages(results)
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _headline(results: Mapping[str, Any]) -> str:
    took = f" in {format_seconds(results['seconds'])}" if "seconds" in results else ""
    where = clean_line(str(results.get("student_path", "no student written")))
    return f"Distilled{took}: {where}"


def _losses(results: Mapping[str, Any]) -> dict[str, Points]:
    """The first loss of each stage, and those the run has written down since."""
    found: dict[str, Points] = {
        row["stage"]: [(1.0, row["first_loss"])] if _is_number(row["first_loss"]) else []
        for row in _stages(results)
    }
    path = Path(results.get("output_dir", "")) / "metrics.jsonl"
    try:
        too_large = path.stat().st_size > MAX_METRICS_BYTES
        lines = [] if too_large else path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return found
    for line in lines:
        try:
            event = parse_json_object(line)
            if event["event"] == "step" and all(_is_number(event[k]) for k in ("step", "loss")):
                found[event["stage"]].append((float(event["step"]), float(event["loss"])))
        except (ValueError, LookupError, TypeError):
            continue
    return found


def _is_number(value: Any) -> bool:
    # JSON has whole numbers of any length, and a picture needs room above the largest.
    return isinstance(value, int | float) and abs(value) < 1e300


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [tuple(columns), *(tuple(map(clean_line, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _text(value: str) -> str:
    return html.escape(clean_line(value))


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float = 0.6) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" stroke-opacity="{opacity}"/>'


def _label(x: float, y: float, words: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="11" fill="currentColor">{_text(words)}</text>'
