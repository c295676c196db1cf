"""The figures of whole runs, from what ``run_files.py`` read. A figure without data is None."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cleangpt.metrics_log import format_seconds
from distillation.evaluation.results import ModelResult
from distillation.report.run_files import Curve, Run, group, groups, number
from distillation.report.svg import CHARACTER_WIDTH, Chart, Number, Scale, scale_for, short_number

WIDTH = 400.0
LEFT, RIGHT = 46.0, 388.0
Box = tuple[Number, Number, Number, Number]


@dataclass(frozen=True)
class Figure:
    """A picture and what to see in it.

    Args:
        title: Its heading.
        caption: How to read it, in a sentence or two.
        markup: SVG.
        legend: (class of a mark, what it stands for).
    """

    title: str
    caption: str
    markup: str
    legend: tuple[tuple[str, str], ...] = ()


def size_speed_quality(models: Sequence[ModelResult], marks: Sequence[str]) -> Figure | None:
    """Size across, perplexity upwards, speed as area.

    Args:
        models: What to show; those whose perplexity is not finite are left out.
        marks: Their classes in the style.
    """
    shown = [
        (model, mark)
        for model, mark in zip(models, marks, strict=True)
        if math.isfinite(model["quality"]["perplexity"])
    ]
    if not shown:
        return None
    height, bottom = 270.0, 226.0
    chart = Chart("Size, speed and quality of every model", WIDTH, height)
    x = _log_scale([m["size"]["parameters"] for m, _ in shown], LEFT + 34, RIGHT - 44)
    y = _log_scale([m["quality"]["perplexity"] for m, _ in shown], bottom - 26, 36)
    chart.y_axis(y, LEFT, RIGHT)
    chart.x_axis(x, 14, bottom, count=3)
    chart.text((LEFT + RIGHT) / 2, height - 8, "stored parameters", "axis mid")
    chart.text(0, 9, "perplexity (lower is better)", "axis")
    told = [model["speed"] for model, _ in shown]
    speeds = [number(s["forward_tokens_per_second"]) if s else math.nan for s in told]
    fastest = max((speed for speed in speeds if speed > 0), default=1.0)
    taken: list[Box] = []
    labels: list[tuple[str, float, float, float]] = []
    for (model, mark), speed in zip(shown, speeds, strict=True):
        radius = 4 + 16 * math.sqrt(speed / fastest) if speed > 0 else 6.0
        at_x, at_y = x(model["size"]["parameters"]), y(model["quality"]["perplexity"])
        size, perplexity = model["size"]["parameters"], model["quality"]["perplexity"]
        fast = f", {speed:,.0f} tokens/s" if speed > 0 else ""
        hint = f"{model['name']}: perplexity {perplexity:,.2f}, {size:,} parameters{fast}"
        chart.add("circle", f"bubble {mark}", hint, cx=at_x, cy=at_y, r=radius)
        taken.append((at_x - radius, at_y - radius, at_x + radius, at_y + radius))
        labels.append((model["name"], at_x, at_y, radius))
    for name, at_x, at_y, radius in labels:
        _label(chart, name, (at_x, at_y, radius), taken)
    measured = any(speed > 0 for speed in speeds)
    area = " The area of a circle grows with the speed in tokens/s." if measured else ""
    return Figure(
        "Size, speed and quality",
        f"Towards the lower left is smaller and better; both axes are logarithmic.{area}",
        chart.markup(),
    )


def _log_scale(values: Sequence[Number], start: Number, end: Number) -> Scale:
    room = 1.1 * (max(values) / min(values)) ** 0.05
    return Scale(min(values) / room, max(values) * room, start, end, is_log=True)


def _label(
    chart: Chart, name: str, circle: tuple[Number, Number, Number], taken: list[Box]
) -> None:
    """Write a name beside its circle, at the first side where it covers nothing."""
    words = name if len(name) <= 25 else f"{name[:24]}\N{HORIZONTAL ELLIPSIS}"
    (x, y, radius), long = circle, CHARACTER_WIDTH * len(words)
    places = [
        (x + radius + 5, y + 4, "", x + radius + 5),
        (x - radius - 5, y + 4, " end", x - radius - 5 - long),
        (x, y - radius - 5, " mid", x - long / 2),
        (x, y + radius + 14, " mid", x - long / 2),
        (WIDTH - 4, y - radius - 5, " end", WIDTH - 4 - long),
        (LEFT + 2, y + radius + 14, "", LEFT + 2),
    ]
    boxes = [(begin, base - 11, begin + long, base + 3) for _, base, _, begin in places]
    free = [
        index
        for index, box in enumerate(boxes)
        if box[0] > LEFT and box[2] < WIDTH and not any(_meet(box, other) for other in taken)
    ]
    best = free[0] if free else len(places) - 1
    taken.append(boxes[best])
    chart.text(places[best][0], places[best][1], words, f"label{places[best][2]}")


def _meet(one: Box, other: Box) -> bool:
    across = min(one[2], other[2]) > max(one[0], other[0])
    return across and min(one[3], other[3]) > max(one[1], other[1])


def training_curves(run: Run) -> list[Figure]:
    """One small picture per stage that learnt."""
    return [
        _training_curve(curve, _stage_title(curve))
        for curve in run.curves
        if curve.steps or any(map(math.isfinite, curve.validation))
    ]


def _stage_title(curve: Curve) -> str:
    row, name = curve.row, curve.stage
    if name.startswith("block-"):
        teacher = row.get("teacher_block")
        block = f"Block {name.removeprefix('block-').lstrip('0') or '0'}"
        return block if teacher is None else f"{block} \N{RIGHTWARDS ARROW} teacher {teacher}"
    return {"lm-head": "Head", "polish": "Polish"}.get(name, name)


def _training_curve(curve: Curve, title: str) -> Figure:
    width, top, bottom, left, right = 220.0, 10.0, 104.0, 38.0, 210.0
    chart = Chart(f"Loss of {title} over its training", width, 126)
    validation = _validation_places(curve)
    last = max([1, *(step for step, _ in curve.steps), *(int(at) for at, _ in validation)])
    epochs = len(curve.epochs) if curve.row else 0
    values = [*curve.epochs, *(loss for _, loss in [*curve.steps, *validation])]
    y = scale_for(values, bottom, top, may_be_log=True)
    x = Scale(0, last, left, right)
    chart.y_axis(y, left, right, count=3)
    chart.text(left, bottom + 15, "0", "tick")
    chart.text(right, bottom + 15, f"{last:,} step{'s' * (last != 1)}", "tick end")
    for index, loss in enumerate(curve.epochs):
        if math.isfinite(loss) and epochs:
            hint = f"mean training loss of epoch {index + 1}: {loss:.4g}"
            begin, end = x(last * index / epochs), x(last * (index + 1) / epochs)
            chart.add("line", "student mean", hint, x1=begin, x2=end, y1=y(loss), y2=y(loss))
    steps = [(x(step), y(loss)) for step, loss in curve.steps if math.isfinite(loss)]
    chart.line(steps, "student", f"{title}: training loss")
    for step, loss in _thinned(curve.steps, 40):
        if math.isfinite(loss):
            hint = f"step {step:,}: training loss {loss:.4g}"
            chart.add("circle", "student dot", hint, cx=x(step), cy=y(loss), r=2)
    held_out = [(x(at), y(loss)) for at, loss in validation if math.isfinite(loss)]
    if len(held_out) > 1:
        chart.line(held_out, "baseline dashed", f"{title}: held-out loss")
    for at, loss in validation:
        if math.isfinite(loss):
            hint = f"step {at:,.0f}: held-out loss {loss:.4g}"
            chart.add("circle", "baseline ring", hint, cx=x(at), cy=y(loss), r=3)
    return Figure(title, _outcome(curve), chart.markup())


def _validation_places(curve: Curve) -> list[tuple[float, float]]:
    """Held-out losses at the steps they were measured at; epochs are equally long."""
    epochs = max(len(curve.epochs), len(curve.validation) - 1, 1)
    last = number(curve.row.get("steps"))
    if not math.isfinite(last):
        last = max([1, *(step for step, _ in curve.steps)])
    return [(index * last / epochs, loss) for index, loss in enumerate(curve.validation)]


def _thinned(points: Sequence[tuple[int, float]], most: int) -> Sequence[tuple[int, float]]:
    return points[:: max(1, math.ceil(len(points) / most))]


def _outcome(curve: Curve) -> str:
    row = curve.row
    if not row:
        return f"going on, loss {short_number(curve.newest)}"
    validation = [loss for loss in curve.validation if math.isfinite(loss)]
    if validation:
        begin, end = validation[0], min(validation)
    else:
        begin, end = number(row.get("first_loss")), number(row.get("last_loss"))
    told = "held out " if validation else ""
    words = [f"{told}{short_number(begin)} to {short_number(end)}"]
    words.append(f"{number(row.get('seconds')):.1f} s")
    if row.get("verdict"):
        words.append(str(row["verdict"]))
    return ", ".join(words)


def plan_against_actual(run: Run) -> Figure | None:
    """Planned and real seconds of every stage."""
    planned = {
        str(stage.get("stage")): number(stage.get("seconds"))
        for stage in groups(group(run.manifest.get("planned")).get("stages"))
    }
    took = {str(row.get("stage")): number(row.get("seconds")) for row in run.rows}
    names = [name for name in {**planned, **took} if planned.get(name) or took.get(name)]
    if not planned or not names:
        return None
    left, right, each = 70.0, WIDTH - 52, 30.0
    height = 8 + each * len(names)
    chart = Chart("Planned and real time of every stage", WIDTH, height)
    finite = [v for d in (planned, took) for v in d.values() if math.isfinite(v)]
    x = Scale(0, max([*finite, 1e-9]), left, right)
    for index, name in enumerate(names):
        y = 6 + each * index
        chart.text(left - 8, y + 15, name, "tick end", limit=14)
        for offset, mark, told, source in (
            (0, "teacher", "planned", planned),
            (11, "student", "took", took),
        ):
            value = source.get(name, math.nan)
            if math.isfinite(value):
                words = format_seconds(value) if value >= 60 else f"{value:.1f} s"
                chart.add("rect", mark, f"{name} {told} {words}", x=left, y=y + offset,
                          width=max(1.0, x(value) - left), height=9, rx=1.5)  # fmt: skip
                chart.text(x(value) + 5, y + offset + 8.5, words, "tick")
    return Figure(
        "Plan against actual",
        "Seconds of each stage as planned before the run, from a short measurement on a small copy,"
        " and as they were.",
        chart.markup(),
        (("teacher", "planned"), ("student", "took")),
    )
