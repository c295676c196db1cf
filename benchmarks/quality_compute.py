"""How much of another arm's compute the default recipe needs, and why bars are not met."""

import itertools
import math
from collections.abc import Sequence

from benchmarks.quality_answers import FEWEST_SEEDS, Groups
from benchmarks.quality_plan import BUDGETS, KINDS, SHORTENED
from benchmarks.quality_statistics import estimate
from benchmarks.report import table_line

BEST, OTHERS = "A5", ("A1", "A3")
OPERATIONS = {**BUDGETS, **SHORTENED}
ABOUT = """How much of another arm's compute A5 needs for that arm's final loss, seed by seed.
Between two budgets that were run, its loss is taken as a straight line over the logarithm of the
operations."""


def compute_table(groups: Groups) -> str:
    """The share of another arm's operations at which A5 has its final loss, with its interval."""
    head = ["the final loss of", "student", "budget", "A5 has it at", "seeds"]
    lines = [table_line(head), table_line(["---"] * len(head))]
    for other in OTHERS:
        for kind in KINDS:
            for budget, operations in BUDGETS.items():
                found = shares(groups, other, kind, budget)
                if found:
                    shown = in_words(found, min(BUDGETS.values()) / operations)
                    lines.append(table_line([other, kind, budget, shown, str(len(found))]))
    return "\n".join([ABOUT, "", *lines]) if len(lines) > 2 else "No answer yet."


def shares(groups: Groups, other: str, kind: str, budget: str) -> list[float]:
    """The share that each seed says; see :func:`share_of_compute`.

    Of the seeds of both arms at that budget, and A5's other budgets that have them all.
    """
    ends = [groups.get((arm, kind, budget), {}) for arm in (BEST, other)]
    seeds = sorted(set(ends[0]).intersection(ends[1]))
    curves = {
        operations: group
        for name, operations in OPERATIONS.items()
        if operations <= BUDGETS[budget]
        and set(group := groups.get((BEST, kind, name), {})).issuperset(seeds)
    }
    if len(curves) < 2:
        return []
    return [
        share_of_compute(
            sorted((operations, group[seed]["loss"]) for operations, group in curves.items()),
            ends[1][seed]["loss"],
            BUDGETS[budget],
        )
        for seed in seeds
    ]


def share_of_compute(
    curve: Sequence[tuple[float, float]], target: float, operations: float
) -> float:
    """Where a curve of (operations, loss) first has a loss, as a share of some operations.

    Returns:
        The share; that of the curve's first point where the loss is lower already, infinity where
        it never is.
    """
    for (before, higher), (after, lower) in itertools.pairwise(curve):
        if higher <= target:
            return before / operations
        if lower <= target:
            way = (higher - target) / (higher - lower)
            return before * (after / before) ** way / operations
    return math.inf


def in_words(found: Sequence[float], least: float) -> str:
    """The shares of all seeds as one cell; the least is that of the smallest budget.

    A seed that is ahead at the smallest budget already may need less than that.
    """
    never = sum(math.isinf(share) for share in found)
    if never:
        shown = f"more than 100% in {never} of {len(found)} seeds"
    else:
        mean = estimate(found)
        exactly = f"{mean.mean:.0%} [{mean.low:.0%}, {mean.high:.0%}]"
        shown = f"at most {mean.mean:.0%}" if min(found) <= least else exactly
    return shown if len(found) >= FEWEST_SEEDS else f"{shown}, too few seeds"


def reasons(groups: Groups, half: Groups) -> str:
    """Why goals are not met, as far as the records tell.

    Args:
        groups: All records that can be compared.
        half: Those of students with half of the teacher's parameters.
    """
    found = []
    floors = {kind: _mean_loss(groups, "A0", kind) for kind in KINDS}
    ends = {kind: _mean_loss(half, BEST, kind) for kind in ("Factored", "SASP")}
    if not any(math.isnan(loss) for loss in (*floors.values(), *ends.values())):
        shown = ", ".join(f"{kind} {loss:.2f}" for kind, loss in floors.items())
        found.append(
            "- **The way from scratch to the teacher.** SASP learns the text from scratch faster"
            f" than the other kinds (A0 at the middle budget: {shown}). With half of the teacher's"
            f" parameters A5 makes of it about what it makes of Factored ({ends['SASP']:.2f} and"
            f" {ends['Factored']:.2f}), which is a smaller share of a shorter way."
        )
    needed = shares(groups, "A3", "Vanilla", "middle")
    if len(needed) >= FEWEST_SEEDS and max(needed) < math.inf:
        lead = 1 - estimate(needed).mean
        found.append(
            "- **Two thirds of A3's compute.** What A5 is ahead of A3 by at the middle budget is"
            f" worth {lead:.0%} of the compute for Vanilla, where 33% was asked for: its lead is"
            " smaller there than at the small budget (H1)."
        )
    return "\n".join(found)


def _mean_loss(groups: Groups, arm: str, kind: str) -> float:
    records = groups.get((arm, kind, "middle"), {}).values()
    losses = [record["loss"] for record in records]
    return estimate(losses).mean if len(losses) >= FEWEST_SEEDS else math.nan
