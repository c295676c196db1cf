"""The hypotheses and the goals of the study, answered in sentences from the records alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality_plan import (
    BUDGETS,
    HEAD_SHARES,
    KINDS,
    PRIMARY_CONTRASTS,
    REAL_KIND,
    WIDTHS,
)
from benchmarks.quality_statistics import Contrast, contrast, estimate, holm
from benchmarks.quality_tables import TABLES
from benchmarks.report import table_line

Record = dict[str, Any]
Group = dict[int, Record]
"""The records of one arm, student and budget, by seed."""
Groups = dict[tuple[str, str, str], Group]
"""The same by (arm, kind, budget)."""

FEWEST_SEEDS = 5


def paired(
    groups: Groups, first: str, second: str, kind: str, budget: str, against: str | None = None
) -> Contrast | None:
    """The difference of two arms over the seeds both have; None where there are fewer than two.

    Args:
        groups: All records.
        first: The arm whose loss counts.
        second: The arm whose loss is subtracted.
        kind: Kind of student.
        budget: Of both arms, or of the first.
        against: Budget of the second, if it is another.
    """
    keys = (first, kind, budget), (second, kind, budget if against is None else against)
    pair = [groups.get(key, {}) for key in keys]
    seeds = sorted(set(pair[0]) & set(pair[1]))
    if len(seeds) < 2:
        return None
    return contrast(*([group[seed]["loss"] for seed in seeds] for group in pair))


def reading(found: Contrast) -> str:
    """A difference in words: better is a lower loss."""
    difference = found.difference
    if difference.count < FEWEST_SEEDS:
        return "too few seeds"
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    return "better" if difference.mean < 0 else "worse"


def corrected(words: str, p: float) -> str:
    """A reading, and whether it stands among all the contrasts that were looked at."""
    return f"{words}, not after Holm" if words in ("better", "worse") and not p < 0.05 else words


PrimaryValues = dict[tuple[str, str, str, str], float]
"""P-values by (first arm, second arm, kind, budget)."""


def primary_values(groups: Groups) -> PrimaryValues:
    """Those of the primary contrasts, with Holm's correction over all that were looked at."""
    found = {
        (first, second, kind, budget): difference.p_value
        for first, second in PRIMARY_CONTRASTS
        for kind in KINDS
        for budget in BUDGETS
        if (difference := paired(groups, first, second, kind, budget))
    }
    return dict(zip(found, holm(list(found.values())), strict=True))


def progress(records: Sequence[Record]) -> str:
    """How much of the plan is done."""
    done = {record["key"] for record in records}
    kinds = (*KINDS, REAL_KIND)
    lines = [table_line(["table", "budget", *kinds]), table_line(["---"] * (2 + len(kinds)))]
    for name, runs in TABLES.items():
        planned = list(runs())
        for budget in dict.fromkeys(run.budget for run in planned):
            cells = []
            for kind in kinds:
                keys = {run.key for run in planned if (run.kind, run.budget) == (kind, budget)}
                cells.append(f"{len(keys & done)} of {len(keys)}")
            lines.append(table_line([name, budget, *cells]))
    return "\n".join(lines)


@dataclass(frozen=True)
class Question:
    """What a contrast asks.

    Args:
        first: The arm that is to have the lower loss.
        second: The other one.
        asks: The question, as the start of a sentence.
    """

    first: str
    second: str
    asks: str


BLOCKS_TRANSFER = (
    Question("A5", "A3", "Blocks, and hidden states fading in the polish, of an inherited student"),
    Question("A4", "A1", "Blocks before the polish of a random student"),
    Question("A5", "A6", "Blocks first, rather than the same polish for the whole budget"),
    Question("A6", "A3", "Hidden states in the polish of an inherited student, without blocks"),
    Question("A5 logits alone", "A3", "Blocks, then logits alone, of an inherited student"),
    Question(
        "A8",
        "A1",
        "Blocks that learnt from an untrained teacher, before the polish with the real one",
    ),
)
INPUTS = tuple(
    Question(f"{arm} {inputs} inputs", arm, f"Blocks of {start}, on {about}")
    for arm, start in (("A5", "an inherited student"), ("A4", "a random student"))
    for inputs, about in (
        ("teacher", "the teacher's states instead of the student's"),
        ("mixed", "the teacher's states at first and the student's at the end"),
    )
)
STITCHES_BRIDGE = (
    Question("A5 random, fixed", "A3", "Blocks through fixed random stitches"),
    Question("A5 fitted, fixed", "A3", "Blocks through fixed fitted stitches"),
    Question("A5 random, trained", "A3", "Blocks through trained stitches that start at random"),
    Question("A5", "A5 fitted, fixed", "Training fitted stitches"),
    Question("A5", "A5 random, trained", "Fitting stitches before their training"),
    *(
        Question(f"A5 {width} wide", f"A3 {width} wide", f"Blocks at a width of {width}")
        for width in WIDTHS
    ),
    Question("A5 unstitched", "A3 unstitched", "Blocks of a student that needs no stitch"),
    Question("A5 as wide", "A5 as wide unstitched", "Stitches between equal widths"),
    Question("A5", "A5 unstitched", "Six narrow blocks, rather than one that needs no stitch"),
)
HEAD_IMPROVES = tuple(
    Question(
        f"A5 {name} head {share:.0%}",
        "A5" if name == "fitted" else f"A5 {name} head 0%",
        f"A head phase of {share:.0%}, {about}",
    )
    for name, about in {
        "fitted": "from the fitted head",
        "random": "from a random head",
        "tied": "with a tied head",
        "mse": "with MSE on logits",
        "ce": "with cross-entropy",
    }.items()
    for share in (HEAD_SHARES if name in ("fitted", "random") else (0.2,))
)


def answers(groups: Groups, questions: Sequence[Question]) -> str:
    """One sentence per student and question: where it helps, where it hurts."""
    lines, adjusted = [], primary_values(groups)
    for kind in KINDS:
        for question in questions:
            found = {
                budget: difference
                for budget in BUDGETS
                if (difference := paired(groups, question.first, question.second, kind, budget))
            }
            if found:
                name = f"({question.first} - {question.second})"
                arms = question.first, question.second, kind
                parts = [
                    _in_words(budget, each, adjusted.get((*arms, budget), 0.0))
                    for budget, each in found.items()
                ]
                lines.append(f"- **{kind}.** {question.asks} {name}: {'; '.join(parts)}.")
    return "\n".join(lines) if lines else "No answer yet."


def _in_words(budget: str, found: Contrast, p: float) -> str:
    difference = found.difference
    words = corrected(reading(found), p)
    return f"{words} at the {budget} budget ({difference} nats, {difference.count} seeds)"


@dataclass(frozen=True)
class Goal:
    """A bar that was set before the runs.

    Args:
        text: What was asked for.
        first: The arm that must do it.
        second: Against whom.
        budgets: Where.
        at_most: The largest difference in nats that meets it.
        against: Budget of the second arm, if it is another.
    """

    text: str
    first: str
    second: str
    budgets: tuple[str, ...]
    at_most: float
    against: str | None = None


GOALS = (
    Goal("0.25 nats better than logit distillation", "A5", "A1", ("small", "middle"), -0.25),
    Goal("never worse than logit distillation", "A5", "A1", ("large",), 0.0),
    Goal("0.02 nats better than inherited logit distillation", "A5", "A3", ("small",), -0.02),
    Goal(
        "never 0.005 nats worse than inherited logit distillation",
        "A5",
        "A3",
        ("middle", "large"),
        0.005,
    ),
    *(
        Goal(f"logit distillation's loss at the {more} budget", "A5", "A1", (less,), 0.0, more)
        for less, more in (("small", "middle"), ("middle", "large"))
    ),
    *(
        Goal(
            f"inherited logit distillation's loss at the {more} budget",
            "A5",
            "A3",
            (f"two thirds of {more}",),
            0.0,
            more,
        )
        for more in ("middle", "large")
    ),
    Goal("better than the tutorial's recipe", "A5", "T", ("small", "middle", "large"), 0.0),
    Goal("0.10 nats better than training from scratch", "A5", "A0", ("small", "middle"), -0.10),
)


GAP_BUDGET = "middle"
GAPS_TO_CLOSE = {"Vanilla": 0.60, "Factored": 0.45, "SASP": 0.45}
"""Shares of the way from training from scratch to the teacher."""


def goals_table(groups: Groups, half: Groups) -> str:
    """Each bar with the default recipe's loss less the other's; met where the whole interval is.

    Args:
        groups: All records that can be compared.
        half: Those of students with half of the teacher's parameters.
    """
    head = [
        "goal",
        "student",
        "budget",
        "A5 less the other, in nats (95 % interval)",
        "seeds",
        "met",
    ]
    lines = [table_line(head), table_line(["---"] * len(head))]
    for goal in GOALS:
        for kind in KINDS:
            for budget in goal.budgets:
                found = paired(groups, goal.first, goal.second, kind, budget, goal.against)
                if found is None:
                    continue
                difference = found.difference
                cells = [str(difference), str(difference.count), _is_met(found, goal.at_most)]
                lines.append(table_line([goal.text, kind, budget, *cells]))
    gaps = _gap_lines(half, "half of its parameters") + _gap_lines(groups, "a third of them")
    return "\n".join([*lines, *gaps])


def _gap_lines(groups: Groups, size: str) -> list[str]:
    lines = []
    for kind, share in GAPS_TO_CLOSE.items():
        found, floor = (groups.get((arm, kind, GAP_BUDGET), {}) for arm in ("A5", "A0"))
        seeds = sorted(set(found) & set(floor))
        if not seeds:
            continue
        closed = estimate([_gap(found[seed], floor[seed]) for seed in seeds])
        met = "yes" if closed.low >= share else "not shown" if closed.high >= share else "no"
        shown = f"closes {closed.mean:.0%} [{closed.low:.0%}, {closed.high:.0%}]"
        goal = f"{share:.0%} of the way from scratch to the teacher, with {size}"
        cells = [shown, str(len(seeds)), met if len(seeds) >= FEWEST_SEEDS else "too few seeds"]
        lines.append(table_line([goal, kind, GAP_BUDGET, *cells]))
    return lines


def _gap(record: Record, floor: Record) -> float:
    way: float = floor["loss"] - record["teacher_loss"]
    return float((floor["loss"] - record["loss"]) / way)


def _is_met(found: Contrast, at_most: float) -> str:
    difference = found.difference
    if math.isnan(difference.mean) or difference.count < FEWEST_SEEDS:
        return "too few seeds"
    if difference.high <= at_most:
        return "yes"
    return "not shown" if difference.low <= at_most else "no"
