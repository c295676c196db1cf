"""Several runs on one page: figures side by side, curves over each other, settings that differ."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillation.evaluation import tables
from distillation.evaluation.results import ModelResult
from distillation.report import words
from distillation.report.figures import LEFT, RIGHT, WIDTH, Figure, size_speed_quality
from distillation.report.page import environment
from distillation.report.run_files import Curve, Run, group, is_count, number, read_run, shown
from distillation.report.svg import Chart, Scale, scale_for

COLUMNS = (
    "run",
    "status",
    "student",
    "parameters",
    "perplexity",
    "KL to teacher",
    "top-1 agreement",
    "tokens/s",
    "training seconds",
)
MANIFEST_SETTINGS = (
    "seed",
    "device",
    "precision",
    "processes",
    "library_version",
    "torch_version",
    "transformers_version",
    "teacher",
    "student",
    "data",
)
UNTOLD = ("config", "reason")
"""What follows from other settings."""
COLOURS = 6


def comparison_page(paths: Sequence[Path]) -> str:
    """The page of several runs.

    Raises:
        InputError: If one of the folders holds no run.
        CheckpointError: If the manifest of one was changed.
    """
    runs = [read_run(path) for path in paths]
    names = _names(runs)
    values: dict[str, Any] = {
        "title": f"{len(runs)} runs: {', '.join(names)}",
        "story": _story(runs, names),
        "names": names,
        "columns": COLUMNS,
        "rows": [_row(run, name) for run, name in zip(runs, names, strict=True)],
        "unevaluated": [
            (name, words.hints(run, None)["evaluate"])
            for run, name in zip(runs, names, strict=True)
            if run.evaluation is None
        ],
        "notes": _notes(runs, names),
        "figures": [f for f in (_models_figure(runs, names), _error_figure(runs, names)) if f],
        "curves": _overlaid(runs, names),
        "differences": differences(runs),
    }
    return environment().get_template("comparison.html").render(values)


def _names(runs: Sequence[Run]) -> list[str]:
    """Folder names; the whole path where two are alike."""
    short = [run.name for run in runs]
    return [
        str(run.path) if short.count(name) > 1 else name
        for run, name in zip(runs, short, strict=True)
    ]


def _row(run: Run, name: str) -> tuple[str, ...]:
    shape = f"{words.student_kind(run)} {words.student_shape(run)}".strip()
    seconds = tables.format_number(words.seconds_taken(run), ",.1f")
    if run.evaluation is None:
        size = group(run.manifest.get("student")).get("parameters")
        parameters = f"{size:,}" if is_count(size) else "-"
        return (name, run.status, shape, parameters, "-", "-", "-", "-", seconds)
    cells = tables.model_rows(run.evaluation)[1]
    return (name, run.status, shape, *cells[1:], seconds)


def _story(runs: Sequence[Run], names: Sequence[str]) -> str:
    found = {
        name: run.evaluation["models"][1]["quality"]
        for run, name in zip(runs, names, strict=True)
        if run.evaluation is not None
    }
    finite = {name: q for name, q in found.items() if math.isfinite(q["perplexity"])}
    if len(finite) < 2:
        return "Fewer than two of these runs were evaluated, so none can be called better."
    best = min(finite, key=lambda name: finite[name]["perplexity"])
    worst = max(finite, key=lambda name: finite[name]["perplexity"])
    return (
        f"Of {len(finite)} evaluated runs {best} has the lowest perplexity,"
        f" {finite[best]['perplexity']:,.4g}, and {worst} the highest,"
        f" {finite[worst]['perplexity']:,.4g}. A difference between two runs is no proof: seeds"
        " differ too."
    )


def _notes(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Why figures may not be comparable, and what could not be read."""
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    texts = {(e["data"]["fingerprint"], e["data"]["num_tokens"]) for e in evaluations}
    found = [
        f"{name}: {problem}"
        for run, name in zip(runs, names, strict=True)
        for problem in run.problems
    ]
    if len(texts) > 1:
        found.insert(0, "The runs were evaluated on different text: their figures do not compare.")
    teachers = {str(group(run.manifest.get("teacher")).get("fingerprint")) for run in runs}
    if len(teachers) > 1:
        found.insert(0, "The runs have different teachers: KL and agreement do not compare.")
    return found


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Every setting that is not the same in all runs, with its values."""
    known = [_settings(run) for run in runs]
    keys = dict.fromkeys(key for settings in known for key in settings)
    return [
        (key, [shown(settings[key]) if key in settings else "-" for settings in known])
        for key in keys
        if any(settings.get(key) != known[0].get(key) for settings in known)
    ]


def _settings(run: Run) -> dict[str, Any]:
    """Settings, what the manifest says of models and data, and the student's configuration."""
    flat: dict[str, Any] = {}
    for key in MANIFEST_SETTINGS:
        value = run.manifest.get(key)
        parts = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{key} {name}".strip(): part for name, part in parts if name not in UNTOLD}
    student = group(run.manifest.get("student_config"))
    flat |= {f"student {name}": value for name, value in student.items()}
    return {**run.settings, **flat}


def _models_figure(runs: Sequence[Run], names: Sequence[str]) -> Figure | None:
    """The students of all evaluated runs, and the teacher of the first."""
    models: list[ModelResult] = []
    marks = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        if run.evaluation is None:
            continue
        teacher, student = run.evaluation["models"][:2]
        if not models:
            models, marks = [teacher], ["teacher"]
        models.append({**student, "name": name})
        marks.append(f"run-{index % COLOURS}")
    return size_speed_quality(models, marks)


def _error_figure(runs: Sequence[Run], names: Sequence[str]) -> Figure | None:
    """The relative error of every block, chained if evaluated and as trained if not."""
    lines = []
    for run, name in zip(runs, names, strict=True):
        hidden = None if run.evaluation is None else run.evaluation["hidden_states"]
        if hidden is not None:
            points = [(b["student_block"], b["relative_error"]) for b in hidden["blocks"]]
        else:
            points = [(int(row["block"]), number(row.get("relative_error"))) for row in run.blocks]
        kind = "as trained" if hidden is None else "as chained"
        finite = [(block, error) for block, error in points if math.isfinite(error)]
        lines.append((f"{name} ({kind})", finite))
    everything = [point for _, points in lines for point in points]
    if not everything:
        return None
    bottom = 184.0
    chart = Chart("Relative error of every block of every run", WIDTH, 222)
    y = scale_for([*(error for _, error in everything), 1.0], bottom, 22, from_zero=True)
    last = max(block for block, _ in everything)
    x = Scale(-0.5, last + 0.5, LEFT, RIGHT)
    chart.y_axis(y, LEFT, RIGHT)
    chart.text(0, 9, "relative error (0 is perfect)", "axis")
    for block in range(0, last + 1, 1 + last // 16):
        chart.text(x(block), bottom + 15, str(block), "tick mid")
    chart.text((LEFT + RIGHT) / 2, 218, "student block", "axis mid")
    for index, (name, points) in enumerate(lines):
        mark = f"run-{index % COLOURS}"
        chart.line([(x(block), y(error)) for block, error in points], mark, name)
        for block, error in points:
            hint = f"{name}, block {block}: {error:.4f}"
            chart.add("circle", f"{mark} dot", hint, cx=x(block), cy=y(error), r=3)
    legend = tuple((f"run-{i % COLOURS}", name) for i, (name, _) in enumerate(lines))
    return Figure(
        "Error of every block",
        "Squared error of hidden states as a share of their variance.",
        chart.markup(),
        legend,
    )


def _overlaid(runs: Sequence[Run], names: Sequence[str]) -> list[Figure]:
    """One small picture per stage, with a line for every run that has it."""
    stages = dict.fromkeys(curve.stage for run in runs for curve in run.curves)
    return [figure for stage in stages if (figure := _overlay(stage, runs, names))]


def _overlay(stage: str, runs: Sequence[Run], names: Sequence[str]) -> Figure | None:
    found = {
        index: _points(curve)
        for index, run in enumerate(runs)
        for curve in run.curves
        if curve.stage == stage
    }
    values = [loss for points in found.values() for _, loss in points]
    if not values:
        return None
    top, bottom, left, right = 10.0, 104.0, 38.0, 210.0
    chart = Chart(f"Loss of {stage} in every run", 220, 126)
    last = max(step for points in found.values() for step, _ in points)
    x, y = Scale(0, last, left, right), scale_for(values, bottom, top, may_be_log=True)
    chart.y_axis(y, left, right, count=3)
    chart.text(left, bottom + 15, "0", "tick")
    chart.text(right, bottom + 15, f"{last:,.0f} steps", "tick end")
    ends = []
    for index, points in found.items():
        mark, name = f"run-{index % COLOURS}", names[index]
        chart.line([(x(step), y(loss)) for step, loss in points], mark, name)
        if points:
            step, loss = points[-1]
            hint = f"{name}, step {step:,.0f}: {loss:.4g}"
            chart.add("circle", f"{mark} dot", hint, cx=x(step), cy=y(loss), r=2.5)
            ends.append(f"{name} {loss:.4g}")
    return Figure(stage, f"at the end: {', '.join(ends)}", chart.markup())


def _points(curve: Curve) -> list[tuple[float, float]]:
    """Logged steps, or the means of epochs where those steps are too few to show a course."""
    steps = [(float(step), loss) for step, loss in curve.steps if math.isfinite(loss)]
    if len(steps) >= 3 or len(curve.epochs) < 2:
        return steps
    total = number(curve.row.get("steps"))
    each = (total if math.isfinite(total) else len(curve.epochs)) / len(curve.epochs)
    return [((i + 1) * each, loss) for i, loss in enumerate(curve.epochs) if math.isfinite(loss)]
