"""The pictures of an evaluation, as PNG bytes.

Drawn with matplotlib's Agg canvas directly: no display, no global state. A value that is NaN or
infinite is written as such and never drawn as a bar or a zero. ``matplotlib`` is imported only
here, inside functions.
"""

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from cleangpt.safe_text import clean_line
from distillation.evaluation.results import EvaluationResult
from distillation.evaluation.tables import format_number

TEXT, GRID = "#1c2430", "#d5dae2"
BARS = ("#8a94a6", "#2563eb", "#c08a3e")  # teacher, student, baselines
_ROLES = ("teacher", "student", "baseline")


def matplotlib_available() -> bool:
    """Whether pictures can be drawn at all."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_plots(result: EvaluationResult) -> dict[str, bytes]:
    """Return file name to PNG, for every picture there are numbers for.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    height = 1.1 + 0.5 * len(result["models"])
    plots = {"models.png": _png(_draw_models, result, (6.4, height))}
    if result["hidden_states"] is not None:
        plots["layer_mse.png"] = _png(_draw_layer_mse, result, (6.4, 3.2))
        plots["relative_error.png"] = _png(_draw_relative_error, result, (6.4, 3.2))
        if result["hidden_states"]["hybrids"]:
            plots["hybrids.png"] = _png(_draw_hybrids, result, (6.4, 3.2))
    return plots


def _png(
    draw: Callable[[Any, EvaluationResult], None],
    result: EvaluationResult,
    inches: tuple[float, float],
) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False, "font.size": 11}):
        figure = Figure(figsize=inches, dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        draw(figure, result)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _style(axes: Any, title: str, grid_axis: str) -> None:
    axes.set_title(title, color=TEXT, fontsize=11, loc="left")
    axes.set_facecolor("none")
    axes.tick_params(which="both", colors=TEXT, length=0)
    axes.grid(axis=grid_axis, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)


def _draw_models(figure: Any, result: EvaluationResult) -> None:
    """Size and perplexity of every model, side by side."""
    models = result["models"]
    names = [clean_line(model["name"], 26) for model in models]
    colours = [BARS[_ROLES.index(model["role"])] for model in models]
    left, right = figure.subplots(1, 2, sharey=True)
    sizes = [float(model["size"]["parameters"]) for model in models]
    unit, suffix = (1e6, "M") if max(sizes) >= 1e6 else (1e3, "k")
    scaled = [size / unit for size in sizes]
    _horizontal_bars(left, names, scaled, colours, f"{{:.3g}}{suffix}")
    _style(left, f"Parameters ({suffix})", "x")
    perplexities = [model["quality"]["perplexity"] for model in models]
    _horizontal_bars(right, names, perplexities, colours, "{:,.4g}")
    _style(right, "Perplexity (lower is better)", "x")
    left.invert_yaxis()


def _horizontal_bars(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    label: str,
) -> None:
    positions = list(range(len(names)))
    finite = [value for value in values if math.isfinite(value)]
    largest = max(finite, default=1.0) or 1.0
    drawable = [value if math.isfinite(value) else math.nan for value in values]
    if _spans_decades(finite):
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        axes.set_xlim(min(finite) / 2, largest * 6)
    else:
        axes.set_xlim(0, largest * 1.35)
        axes.locator_params(axis="x", nbins=4)
    axes.barh(positions, drawable, color=list(colours), height=0.6)
    axes.set_yticks(positions, list(names))
    for position, value in zip(positions, values, strict=True):
        shown = label.format(value) if math.isfinite(value) else format_number(value)
        start = value if math.isfinite(value) else axes.get_xlim()[0]
        axes.annotate(
            shown,
            (start, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=TEXT,
        )


def _spans_decades(finite: Sequence[float]) -> bool:
    """Whether a linear axis would hide the small values, as beside an untrained model."""
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 20


def _plain_numbers(axis: Any) -> None:
    """Label the decades of a logarithmic axis "100", not in mathematical notation."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _block_labels(result: EvaluationResult) -> list[str]:
    assert result["hidden_states"] is not None, "draw_plots checks this"
    blocks = result["hidden_states"]["blocks"]
    if all(block["student_block"] == block["teacher_block"] for block in blocks):
        return [str(block["student_block"]) for block in blocks]
    return [f"{block['student_block']}\u2192{block['teacher_block']}" for block in blocks]


def _draw_layer_mse(figure: Any, result: EvaluationResult) -> None:
    """Mean squared error of every block; logarithmic where the teacher's scale grows with depth."""
    axes = figure.subplots()
    assert result["hidden_states"] is not None, "draw_plots checks this"
    values = [block["mse"] for block in result["hidden_states"]["blocks"]]
    finite = [value for value in values if math.isfinite(value)]
    title = "Hidden-state mean squared error per block"
    if _spans_decades(finite):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        axes.margins(y=0.12)
        title += " (log scale)"
    else:
        axes.set_ylim(0, max(finite, default=0.0) * 1.15 or 1.0)
    _vertical_bars(axes, _block_labels(result), values)
    _style(axes, title, "y")
    axes.set_ylabel("MSE per channel")


def _draw_relative_error(figure: Any, result: EvaluationResult) -> None:
    """Relative error of every block against the mean predictor."""
    axes = figure.subplots()
    assert result["hidden_states"] is not None, "draw_plots checks this"
    values = [block["relative_error"] for block in result["hidden_states"]["blocks"]]
    finite = [value for value in values if math.isfinite(value)]
    axes.set_ylim(0, max([1.12, *(value * 1.15 for value in finite)]))
    _vertical_bars(axes, _block_labels(result), values)
    _style(axes, "Relative error per block (0 = perfect, dashed = mean predictor)", "y")
    axes.axhline(1.0, color=TEXT, linewidth=1, linestyle="--")
    axes.set_ylabel("relative error")


def _draw_hybrids(figure: Any, result: EvaluationResult) -> None:
    """What student blocks cost inside the teacher."""
    axes = figure.subplots()
    assert result["hidden_states"] is not None, "draw_plots checks this"
    hybrids = result["hidden_states"]["hybrids"]
    positions = range(len(hybrids))
    for color, label, values in (
        (BARS[1], "this block alone", [hybrid["kl_alone"] for hybrid in hybrids]),
        (BARS[2], "all up to this block", [hybrid["kl_chained"] for hybrid in hybrids]),
    ):
        axes.plot(positions, values, marker="o", color=color, label=label)
    axes.set_ylim(bottom=0)
    every = 1 + len(hybrids) // 20
    axes.set_xticks(positions[::every], _block_labels(result)[::every])
    _style(axes, "The teacher with student blocks put in", "y")
    axes.set_xlabel("student block")
    axes.set_ylabel("KL to the teacher (nats)")
    axes.legend(frameon=False, labelcolor=TEXT)


def _vertical_bars(axes: Any, labels: Sequence[str], values: Sequence[float]) -> None:
    positions = list(range(len(labels)))
    axes.bar(
        positions,
        [value if math.isfinite(value) else math.nan for value in values],
        color=BARS[1],
        width=0.65,
    )
    axes.set_xlim(-0.6, len(labels) - 0.4)
    every = 1 + len(labels) // 20
    axes.set_xticks(positions[::every], list(labels)[::every])
    arrow = any("\u2192" in label for label in labels)
    axes.set_xlabel("student block \u2192 teacher block" if arrow else "block")
    for position, value in zip(positions, values, strict=True):
        if math.isfinite(value) and len(labels) > 12:
            continue  # too many bars for numbers; the table has them
        axes.annotate(
            format_number(value, ".3g"),
            (position, value if math.isfinite(value) else axes.get_ylim()[0]),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            color=TEXT,
            fontsize=9,
        )
