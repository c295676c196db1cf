"""Tables to choose a student from: by size and kind, and of a real teacher."""

import math
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.quality_answers import Group, Record
from benchmarks.quality_plan import KINDS
from benchmarks.quality_statistics import estimate
from benchmarks.report import table_line


def perplexity(loss: float) -> str:
    """exp(loss), for people: of a student that has lost itself it has dozens of digits."""
    value = math.exp(loss)
    return f"{value:.1f}" if value < 1e4 else f"{value:,.0f}" if value < 1e7 else f"{value:.0e}"


def sizes_page(sized: Sequence[Record], others: Sequence[Record]) -> str:
    """One line per shape and kind of student, the smallest first.

    Args:
        sized: Records of the table ``sizes``.
        others: Those of the main table, for the shape that is only there.
    """
    budgets = {record["budget_name"] for record in sized}
    usual = [r for r in others if r["arm"] == "A5" and r["budget_name"] in budgets]
    groups: dict[tuple[str, int, int], Group] = defaultdict(dict)
    for record in (*usual, *sized):
        shape = record["shape"]
        groups[record["kind"], shape["n_layer"], shape["n_embd"]][record["seed"]] = record
    head = ["student", "blocks x width", "parameters", "perplexity", "KL", "agreement"]
    head += ["tokens/s, decoding, times the teacher's", "seeds"]
    lines = [table_line(head), table_line(["---"] * len(head))]
    for (kind, depth, width), group in sorted(groups.items(), key=_by_size):
        cells = [kind, f"{depth} x {width}", f"{_first(group)['parameters'] / 1e6:.2f}M"]
        cells += [perplexity(_mean(group, "loss")), f"{_mean(group, 'kl'):.3f}"]
        cells += [f"{_mean(group, 'agreement'):.1%}", _speed(group), str(len(group))]
        lines.append(table_line(cells))
    return "\n".join(lines)


def real_page(records: Sequence[Record]) -> str:
    """A real teacher's students: every arm at every size, and what one of each writes."""
    groups: dict[tuple[int, str], Group] = defaultdict(dict)
    for record in records:
        groups[record["parameters"], record["arm"]][record["seed"]] = record
    teacher = records[0]
    own = perplexity(teacher["teacher_loss"])
    about = f"The teacher's perplexity is {own} on the built-in test text"
    if "other_teacher_loss" in teacher:
        about += f", and {perplexity(teacher['other_teacher_loss'])} on the other one"
    about += ". T trains a head of its own, the others one that is tied: so many parameters more"
    head = ["student", "arm", "loss", "perplexity", "on the other text", "KL", "agreement", "seeds"]
    lines = [f"{about}.", "", table_line(head), table_line(["---"] * len(head))]
    for (size, arm), group in sorted(groups.items(), reverse=True):
        shape = _first(group)["shape"]
        width = shape.get("n_embd", "the teacher's width")
        name = f"{shape['n_layer']} x {width}, {size / 1e6:.0f}M"
        loss = estimate([group[seed]["loss"] for seed in sorted(group)])
        known = "other_loss" in _first(group)
        other = perplexity(_mean(group, "other_loss")) if known else ""
        cells = [name, arm, str(loss), perplexity(loss.mean), other]
        cells += [f"{_mean(group, 'kl'):.3f}", f"{_mean(group, 'agreement'):.1%}", str(len(group))]
        lines.append(table_line(cells))
    for (size, arm), group in sorted(groups.items(), reverse=True):
        for prompt, text in _first(group).get("samples", {}).items():
            written = " ".join(text.split()).replace("`", "'")
            lines += ["", f"- {size / 1e6:.0f}M, {arm}: *{prompt}* `{written}`"]
    return "\n".join(lines)


def _by_size(item: tuple[tuple[str, int, int], Group]) -> tuple[int, int]:
    (kind, _, _), group = item
    return _first(group)["parameters"], KINDS.index(kind)


def _first(group: Group) -> Record:
    return group[min(group)]


def _mean(group: Group, name: str) -> float:
    return sum(record[name] for record in group.values()) / len(group)


def _speed(group: Group) -> str:
    rates = [r.get("tokens_per_second") or {} for r in group.values()]
    known = [r["student"] / r["teacher"] for r in rates if r.get("student") and r.get("teacher")]
    return f"{sum(known) / len(known):.2f}" if known else ""
