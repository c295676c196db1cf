"""The figures of a run's blocks: errors, layer pairs, the teacher's states, the layer map."""

import math
from collections.abc import Sequence
from typing import Any

from distillation.audit_text import floor_at_width
from distillation.evaluation.results import EvaluationResult
from distillation.report.figures import LEFT, RIGHT, WIDTH, Figure
from distillation.report.run_files import Run, groups, number, numbers
from distillation.report.svg import Chart, Number, Scale, scale_for, short_number


def block_errors(run: Run | None, result: EvaluationResult | None) -> Figure | None:
    """Every block's relative error, as it was trained and where it stands in the chain."""
    trained = {int(row["block"]): number(row.get("relative_error")) for row in _blocks(run)}
    chained = {int(row["block"]): number(row.get("chained_error")) for row in _blocks(run)}
    hidden = None if result is None else result["hidden_states"]
    for pair in [] if hidden is None else hidden["blocks"]:
        chained[pair["student_block"]] = pair["relative_error"]
        if pair["local_error"] is not None:
            trained[pair["student_block"]] = pair["local_error"]
    blocks = sorted({*trained, *chained})
    values = [v for d in (trained, chained) for v in d.values() if math.isfinite(v)]
    if not values:
        return None
    bottom = 184.0
    chart = Chart("Relative error of every student block, as trained and as chained", WIDTH, 222)
    y = Scale(0, max(1.08, *(value * 1.06 for value in values)), bottom, 22)
    chart.y_axis(y, LEFT, RIGHT)
    chart.text(0, 9, "relative error (0 is perfect)", "axis")
    each = (RIGHT - LEFT) / len(blocks)
    bar = min(17.0, each * 0.36)
    for index, block in enumerate(blocks):
        middle = LEFT + each * (index + 0.5)
        for side, mark, told, errors in (
            (-1, "student soft", "as trained", trained),
            (1, "student", "as chained", chained),
        ):
            value = errors.get(block, math.nan)
            if math.isfinite(value):
                _bar(chart, middle + (0 if side > 0 else -bar), bar, y, value, mark,
                     f"block {block} {told}: {value:.4f}")  # fmt: skip
        if index % (1 + len(blocks) // 16) == 0:
            chart.text(middle, bottom + 15, str(block), "tick mid")
    chart.add("line", "rule", "what a constant reaches", x1=LEFT, x2=RIGHT, y1=y(1), y2=y(1))
    chart.text((LEFT + RIGHT) / 2, 218, "student block", "axis mid")
    return Figure(
        "Error of every block",
        "Squared error of hidden states as a share of their variance. As trained: on the inputs the"
        " block learnt from. As chained: reading what the student's blocks before it make, in the"
        " finished student. The dashed line is what a constant reaches.",
        chart.markup(),
        (("student soft", "as trained"), ("student", "as chained")),
    )


def _blocks(run: Run | None) -> list[dict[str, Any]]:
    return [] if run is None else run.blocks


def _bar(
    chart: Chart, left: Number, width: Number, y: Scale, value: Number, mark: str, hint: str
) -> None:
    top, bottom = y(value), y(0)
    chart.add(
        *("rect", mark, hint), x=left, y=top, width=width, height=max(0.6, bottom - top), rx=1.5
    )


def hybrids(result: EvaluationResult) -> Figure | None:
    """What student blocks cost inside the teacher."""
    hidden = result["hidden_states"]
    if hidden is None or not hidden["hybrids"]:
        return None
    found = hidden["hybrids"]
    alone = [(h["student_block"], h["kl_alone"]) for h in found]
    chained = [(h["student_block"], h["kl_chained"]) for h in found]
    values = [value for _, value in [*alone, *chained]]
    bottom = 184.0
    chart = Chart("KL to the teacher of the teacher with student blocks put in", WIDTH, 222)
    y = scale_for(values, bottom, 22, from_zero=True)
    x = Scale(-0.5, len(found) - 0.5, LEFT, RIGHT)
    chart.y_axis(y, LEFT, RIGHT)
    chart.text(0, 9, "KL to the teacher (nats per token)", "axis")
    for points, mark, told in (
        (alone, "student", "alone"),
        (chained, "baseline", "with all before it"),
    ):
        finite = [(block, value) for block, value in points if math.isfinite(value)]
        chart.line([(x(b), y(v)) for b, v in finite], mark, told)
        for block, value in finite:
            hint = f"block {block} {told}: {value:.4f}"
            chart.add("circle", f"{mark} dot", hint, cx=x(block), cy=y(value), r=3)
    for block in range(0, len(found), 1 + len(found) // 16):
        chart.text(x(block), bottom + 15, str(block), "tick mid")
    chart.text((LEFT + RIGHT) / 2, 218, "student block put into the teacher", "axis mid")
    return Figure(
        "The teacher with student blocks put in",
        "What each block costs the teacher alone, and with all student blocks before it.",
        chart.markup(),
        (("student", "this block alone"), ("baseline", "all up to this block")),
    )


def heat_map(result: EvaluationResult) -> Figure | None:
    """Similarity of every student block with every teacher block; the pairs taught are framed."""
    hidden = result["hidden_states"]
    table = None if hidden is None else hidden.get("similarity")
    if hidden is None or not table or not table[0]:
        return None
    rows, columns = len(table), len(table[0])
    side = min(44.0, (RIGHT - LEFT) / columns, 320 / rows)
    left, bottom = LEFT + 4, 16 + side * rows
    height = bottom + 36
    chart = Chart("Similarity of every student block with every teacher block", WIDTH, height)
    chart.text(0, 9, "student block", "axis")
    taught = {block["student_block"]: block["teacher_block"] for block in hidden["blocks"]}
    finite = [value for values in table for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    for row, values in enumerate(table):
        y = bottom - side * (row + 1)
        for column, value in enumerate(values):
            x = left + side * column
            known = math.isfinite(value)
            # The darkest still bears text; what counts is the order, so all of the scale is used.
            strength = (value - low) / (high - low or 1.0) if known else 0.0
            hint = f"student {row}, teacher {column}: {short_number(value)}"
            chart.add("rect", "heat" if known else "no-heat", hint, x=x, y=y, width=side,
                      height=side, fill_opacity=0.03 + 0.52 * strength)  # fmt: skip
            if side >= 30:
                chart.text(x + side / 2, y + side / 2 + 4, f"{value:.2f}", "label mid")
        if row % (1 + rows // 16) == 0:
            chart.text(left - 6, y + side / 2 + 4, str(row), "tick end")
    for row, column in taught.items():
        chart.add("rect", "frame", f"block {row} learnt from {column}", x=left + side * column + 1,
                  y=bottom - side * (row + 1) + 1, width=side - 2, height=side - 2)  # fmt: skip
    for column in range(0, columns, 1 + columns // 16):
        chart.text(left + side * (column + 0.5), bottom + 15, str(column), "tick mid")
    chart.text(left + side * columns / 2, height - 4, "teacher block", "axis mid")
    return Figure(
        "Layer pairs",
        "Linear CKA of hidden states, channels standardised: 1 is the same up to rotation, 0 is"
        f" nothing in common; the colour runs from {low:.2f} to {high:.2f}. The pairs of the layer"
        " map are framed; a taught block should be most like its own teacher block.",
        chart.markup(),
    )


def audit_figures(run: Run) -> list[Figure]:
    """Outlier channels of the teacher, and the floor at the student's width against the reached."""
    levels = groups(run.audit.get("levels"))
    if not levels:
        return []
    found = [_outliers(levels), _floors(run, levels)]
    return [figure for figure in found if figure is not None]


def _outliers(levels: Sequence[dict[str, Any]]) -> Figure | None:
    shares = [number(level.get("largest_channel_share")) for level in levels]
    if not any(map(math.isfinite, shares)):
        return None
    bottom = 184.0
    chart = Chart("Share of the largest channel in the energy of every level", WIDTH, 222)
    y = scale_for([100 * share for share in shares], bottom, 22, from_zero=True)
    chart.y_axis(y, LEFT, RIGHT)
    chart.text(0, 9, "% of the energy in the largest channel", "axis")
    each = (RIGHT - LEFT) / len(levels)
    for index, (level, share) in enumerate(zip(levels, shares, strict=True)):
        massive = len(numbers(level.get("massive_channels")))
        middle = LEFT + each * (index + 0.5)
        bar = min(30.0, each * 0.66)
        if math.isfinite(share):
            told = f"{_level(index)}: {share:.1%}, {massive} massive channels"
            mark = "baseline" if massive else "teacher"
            _bar(chart, middle - bar / 2, bar, y, 100 * share, mark, told)
        if massive:
            chart.text(middle, y(100 * share) - 4, str(massive), "label mid")
        if index % (1 + len(levels) // 16) == 0:
            chart.text(middle, bottom + 15, "emb" if index == 0 else str(index - 1), "tick mid")
    chart.text((LEFT + RIGHT) / 2, 218, "output of teacher block", "axis mid")
    return Figure(
        "Outlier channels of the teacher",
        "A channel is massive where a value is a hundred times the median magnitude; such levels"
        " are coloured, with their number of massive channels. A plain squared error would mostly"
        " learn those.",
        chart.markup(),
        (("teacher", "no massive channel"), ("baseline", "massive channels")),
    )


def _level(index: int) -> str:
    return "embeddings" if index == 0 else f"block {index - 1}"


def _floors(run: Run, levels: Sequence[dict[str, Any]]) -> Figure | None:
    width = number(run.audit.get("student_width"))
    reached = {
        int(row["teacher_block"]): number(row.get("relative_error"))
        for row in run.blocks
        if row.get("teacher_block") is not None
    }
    try:
        floors = [floor_at_width(run.audit["floor_widths"], level["rank_floor"], int(width))
                  for level in levels[1:]]  # fmt: skip
    except (LookupError, TypeError, ValueError, ZeroDivisionError):
        return None
    if not floors:
        return None
    bottom = 184.0
    chart = Chart("Least error at the student's width, and the error reached", WIDTH, 222)
    values = [*floors, *(value for value in reached.values() if math.isfinite(value))]
    y = scale_for(values, bottom, 22, from_zero=True)
    chart.y_axis(y, LEFT, RIGHT)
    chart.text(0, 9, "relative error", "axis")
    each = (RIGHT - LEFT) / len(floors)
    bar = min(30.0, each * 0.66)
    for block, floor in enumerate(floors):
        middle = LEFT + each * (block + 0.5)
        hint = f"teacher block {block}: floor {floor:.4f}"
        _bar(chart, middle - bar / 2, bar, y, floor, "teacher", hint)
        value = reached.get(block, math.nan)
        if math.isfinite(value):
            hint = f"teacher block {block}: reached {value:.4f}"
            chart.add("circle", "student dot", hint, cx=middle, cy=y(value), r=4)
        if block % (1 + len(floors) // 16) == 0:
            chart.text(middle, bottom + 15, str(block), "tick mid")
    chart.text((LEFT + RIGHT) / 2, 218, "teacher block", "axis mid")
    return Figure(
        f"What {width:.0f} channels can hold",
        "The floor is the least relative error of any linear read-out of as many channels as the"
        " student has, on normalised states. The dot is what the block reached while it was"
        " trained; with another loss or other inputs it is measured on other states.",
        chart.markup(),
        (("teacher", "floor"), ("student", "reached")),
    )


def layer_map(run: Run) -> Figure | None:
    """Which teacher block each student block learnt from."""
    pairs = run.layer_map
    if not pairs:
        return None
    teachers = 1 + max([len(groups(run.audit.get("levels"))) - 2, *pairs.values()])
    students = 1 + max(pairs)
    chart = Chart(f"Layer map: {_in_words(pairs)}", WIDTH, 128)
    step = (WIDTH - 16) / max(teachers, students)
    side = min(26.0, step * 0.72)
    places = {
        name: [8 + (WIDTH - 16) * (index + 0.5) / count for index in range(count)]
        for name, count in (("teacher", teachers), ("student", students))
    }
    for own, theirs in pairs.items():
        x, to = places["student"][own], places["teacher"][theirs]
        path = f"M{x:.1f} 86 C{x:.1f} 66 {to:.1f} 66 {to:.1f} 46"
        chart.add("path", "student line", f"block {own} learnt from {theirs}", d=path)
    for name, y, caption in (("teacher", 20.0, 11.0), ("student", 86.0, 126.0)):
        chart.text(8, caption, f"{name} blocks", "axis")
        for index, x in enumerate(places[name]):
            used = index in (pairs.values() if name == "teacher" else pairs)
            mark = f"{name} box" if used else "empty box"
            chart.add("rect", mark, f"{name} block {index}", x=x - side / 2, y=y, width=side,
                      height=26, rx=3)  # fmt: skip
            if side >= 13:
                chart.text(x, y + 17, str(index), "on-box mid" if used else "tick mid")
    return Figure(
        "Layer map",
        "Each student block learns the output of the teacher block it is joined to; a hollow one"
        " was not taught, or taught nothing.",
        chart.markup(),
    )


def _in_words(pairs: dict[int, int]) -> str:
    return ", ".join(f"student {own} from teacher {theirs}" for own, theirs in pairs.items())
