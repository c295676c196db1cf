"""How much of another arm's compute the default recipe needs for the same loss."""

import itertools
import math
from collections.abc import Sequence

from benchmarks.quality_answers import Groups
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
    """The share that each seed says, of the seeds that all have; see :func:`share_of_compute`."""
    curves = {
        name: groups[BEST, kind, name]
        for name, operations in OPERATIONS.items()
        if operations <= BUDGETS[budget] and (BEST, kind, name) in groups
    }
    target = groups.get((other, kind, budget), {})
    seeds = set(target).intersection(*curves.values()) if len(curves) > 1 else set()
    return [
        share_of_compute(
            sorted((OPERATIONS[name], group[seed]["loss"]) for name, group in curves.items()),
            target[seed]["loss"],
            BUDGETS[budget],
        )
        for seed in sorted(seeds)
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
    """The shares of all seeds as one cell; the least is that of the smallest budget."""
    never = sum(math.isinf(share) for share in found)
    if never:
        return f"more than 100% in {never} of {len(found)} seeds"
    if max(found) <= least:
        return f"at most {least:.0%}"
    mean = estimate(found)
    return f"{mean.mean:.0%} [{mean.low:.0%}, {mean.high:.0%}]"
