"""The numbers of an evaluation as rows of text, the same for terminal, Markdown and HTML.

A value that was not measured shows as "-", one that is not finite as "NaN" or "inf".
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

from cleangpt.safe_text import clean_line
from distillation.displays import html_table
from distillation.evaluation.results import EvaluationResult, HiddenResult, ModelResult

MODEL_COLUMNS = (
    "model",
    "parameters",
    "perplexity",
    "KL to teacher",
    "top-1 agreement",
    "tokens/s",
)
DETAIL_COLUMNS = (
    "model",
    "non-embedding",
    "size",
    "blocks x width",
    "loss (nats)",
    "bits per byte",
    "perplexity ratio",
    "calibration error",
    "decode tokens/s",
    "peak memory",
)
BLOCK_COLUMNS = (
    "student block",
    "teacher block",
    "MSE",
    "chained error",
    "local error",
    "cosine",
)
OWN_TEXT_COLUMNS = (
    "model",
    "KL on the text",
    "first / last quarter",
    "KL on its own",
    "first / last quarter",
    "teacher's loss of it",
    "repeated",
)
HYBRID_COLUMNS = ("KL in the teacher", "KL with all before it")


class ShownEvaluation(dict[str, Any]):
    """An ``EvaluationResult`` that shows itself as its tables, in a terminal and in a notebook."""

    def __repr__(self) -> str:
        """The outcome, the models, and the keys."""
        result: Any = self
        models = text_table(MODEL_COLUMNS, model_rows(result))
        return f"{summary(result)}\n{models}\nkeys: {', '.join(self)}"

    def _repr_html_(self) -> str:
        result: Any = self
        tables = [(MODEL_COLUMNS, model_rows(result)), block_table(result)]
        shown = "".join(html_table(columns, rows) for columns, rows in tables if rows)
        return f"<p>{html.escape(summary(result))}</p>{shown}"


def format_number(value: float | None, spec: str = ",.2f") -> str:
    """Return the number, "-" if there is none, or its name if it is not finite.

    Example:
        >>> format_number(None), format_number(float("nan")), format_number(1234.5)
        ('-', 'NaN', '1,234.50')
    """
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    return format(value, spec) if math.isfinite(value) else str(value)


def format_bytes(value: int | None) -> str:
    """Return a size in bytes with a unit, powers of 1024."""
    if value is None:
        return "-"
    size = float(value)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def format_perplexity(value: float) -> str:
    """Return a perplexity with digits that suit its size."""
    return format_number(value, ",.2f" if abs(value) < 1000 else ",.0f")


def model_rows(result: EvaluationResult) -> list[tuple[str, ...]]:
    """Return the main table, one row per model, in the order of ``MODEL_COLUMNS``."""
    return [
        (
            clean_line(model["name"], 60),
            f"{model['size']['parameters']:,}",
            format_perplexity(model["quality"]["perplexity"]),
            format_number(model["quality"]["kl_nats"], ".4f"),
            _percent(model["quality"]["top1_agreement"]),
            _speed(model, "forward_tokens_per_second"),
        )
        for model in result["models"]
    ]


def detail_table(result: EvaluationResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and rows of the second table; a column that was not measured is left out."""
    rows = [
        (
            clean_line(model["name"], 60),
            f"{model['size']['non_embedding_parameters']:,}",
            format_bytes(model["size"]["size_bytes"]),
            f"{model['size']['num_blocks']} x {model['size']['hidden_size']}",
            format_number(model["quality"]["loss_nats"], ".4f"),
            format_number(model["quality"]["bits_per_byte"], ".4f"),
            format_number(model["quality"]["perplexity_ratio"], ".3f"),
            format_number(model["quality"].get("calibration_error"), ".4f"),
            _speed(model, "decode_tokens_per_second"),
            format_bytes(model["speed"]["peak_memory_bytes"] if model["speed"] else None),
        )
        for model in result["models"]
    ]
    kept = [i for i in range(len(DETAIL_COLUMNS)) if any(row[i] != "-" for row in rows)]
    columns = tuple(DETAIL_COLUMNS[i] for i in kept)
    return columns, [tuple(row[i] for i in kept) for row in rows]


def own_text_table(result: EvaluationResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and rows of the models on text of their own; no row without such figures."""
    found = result.get("own_text")
    if found is None:
        return OWN_TEXT_COLUMNS, []
    rows = [
        (
            clean_line(own["name"], 60),
            format_number(own["kl_text_nats"], ".4f"),
            _ends(own["kl_text_quarters"]),
            format_number(own["kl_nats"], ".4f"),
            _ends(own["kl_quarters"]),
            format_number(own["teacher_loss_nats"], ".3f"),
            _percent(own["repetition"]),
        )
        for own in found["models"]
    ]
    text = (format_number(found["text_loss_nats"], ".3f"), _percent(found["text_repetition"]))
    return OWN_TEXT_COLUMNS, [("the text itself", *["-"] * 4, *text), *rows]


def block_table(result: EvaluationResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and rows of the table of hidden states, and of hybrids if there are any."""
    hidden = result["hidden_states"]
    if hidden is None:
        return BLOCK_COLUMNS, []
    rows = block_rows(hidden)
    if not hidden["hybrids"]:
        return BLOCK_COLUMNS, rows
    costs = [
        (format_number(hybrid["kl_alone"], ".4f"), format_number(hybrid["kl_chained"], ".4f"))
        for hybrid in hidden["hybrids"]
    ]
    return (*BLOCK_COLUMNS, *HYBRID_COLUMNS), [r + c for r, c in zip(rows, costs, strict=True)]


def block_rows(hidden: HiddenResult) -> list[tuple[str, ...]]:
    """Return the table of hidden states, in the order of ``BLOCK_COLUMNS``."""
    return [
        (
            str(block["student_block"]),
            str(block["teacher_block"]),
            format_number(block["mse"], ".4g"),
            format_number(block["relative_error"], ".4f"),
            format_number(block["local_error"], ".4f"),
            format_number(block["cosine"], ".4f"),
        )
        for block in hidden["blocks"]
    ]


def summary(result: EvaluationResult) -> str:
    """Return the outcome in two or three sentences."""
    teacher, student = result["models"][0], result["models"][1]
    quality = student["quality"]
    share = student["size"]["parameters"] / max(teacher["size"]["parameters"], 1)
    sentences = [
        f"The student has {share:.{0 if share >= 0.01 else 2}%} of the teacher's parameters."
    ]
    if math.isfinite(quality["perplexity"]) and math.isfinite(quality["kl_nats"]):
        sentences.append(
            f"Its perplexity is {format_perplexity(quality['perplexity'])} against "
            f"{format_perplexity(teacher['quality']['perplexity'])} "
            f"(x {format_number(quality['perplexity_ratio'], ',.2f')}); both put the same token "
            f"first {_percent(quality['top1_agreement'])} of the time, and KL(teacher || student) "
            f"is {format_number(quality['kl_nats'], '.3f')} nats per token."
        )
    else:
        sentences.append(
            f"Its perplexity is {format_number(quality['perplexity'])} and its KL to the teacher "
            f"{format_number(quality['kl_nats'])}: the model is not usable as it is."
        )
    return " ".join(sentences)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table for a terminal, first column to the left.

    Example:
        >>> print(text_table(("model", "loss"), [("a", "1.5")]))
        model  loss
        a       1.5
    """
    lines = [tuple(columns), *map(tuple, rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], escape: Callable[[str], str]
) -> str:
    """Return a Markdown table, first column to the left, every cell escaped."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = [list(columns), rule, *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ends(quarters: Sequence[float]) -> str:
    return f"{format_number(quarters[0], '.3f')} / {format_number(quarters[-1], '.3f')}"


def _percent(fraction: float) -> str:
    return format_number(fraction * 100, ".1f") + " %"


def _speed(model: ModelResult, key: str) -> str:
    if model["speed"] is None:
        return "-"
    if key == "forward_tokens_per_second":
        return format_number(model["speed"]["forward_tokens_per_second"], ",.0f")
    return format_number(model["speed"]["decode_tokens_per_second"], ",.0f")
