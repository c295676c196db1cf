"""What the seeds say: means with intervals, and differences between arms, paired by seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: In the unit of the values.
        low: Lower end of the 95 % interval (Student's t).
        high: Its upper end.
        deviation: Standard deviation of the values.
        count: How many seeds there were.
    """

    mean: float
    low: float
    high: float
    deviation: float
    count: int

    def __str__(self) -> str:
        """The mean with its interval; without one where there is a single seed."""
        if self.count < 2:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Contrast:
    """The paired difference of two arms, first minus second.

    Args:
        difference: With its t interval.
        p_value: Of the paired t-test, two-sided; NaN for a single pair.
        bootstrap: The BCa 95 % interval of the mean; None for fewer than three pairs.
    """

    difference: Estimate
    p_value: float
    bootstrap: tuple[float, float] | None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value with its 95 % t interval."""
    found = np.asarray(values, dtype=float)
    mean = float(found.mean())
    if len(found) < 2:
        return Estimate(mean, mean, mean, 0.0, len(found))
    deviation = float(found.std(ddof=1))
    half = float(stats.t.ppf(0.975, len(found) - 1)) * deviation / len(found) ** 0.5
    return Estimate(mean, mean - half, mean + half, deviation, len(found))


def contrast(first: Sequence[float], second: Sequence[float]) -> Contrast:
    """Compare two arms on the same seeds, in the same order.

    Raises:
        ValueError: If the numbers of seeds differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} seeds cannot be paired.")
    differences = np.subtract(first, second)
    if len(differences) < 2 or np.ptp(differences) == 0:
        return Contrast(estimate(differences.tolist()), float("nan"), None)
    p_value = float(stats.ttest_rel(first, second).pvalue)
    interval = None
    if len(differences) >= 3:
        found = stats.bootstrap(
            (differences,), np.mean, method="BCa", rng=np.random.default_rng(0)
        ).confidence_interval
        interval = float(found.low), float(found.high)
    return Contrast(estimate(differences.tolist()), p_value, interval)


def over_text(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """The BCa 95 % interval of a difference over the windows of the text it was judged on.

    How much the choice of the text decides, beside how much the seeds do.

    Args:
        first: The losses of each window, [seeds, windows].
        second: Those of the other arm, for the same seeds and windows.
    """
    differences = np.subtract(first, second).mean(0)
    found = stats.bootstrap(
        (differences,), np.mean, method="BCa", rng=np.random.default_rng(0), batch=1000
    ).confidence_interval
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values after Holm (1979); those that are NaN stay so and are not counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not np.isnan(p))
    adjusted = [float("nan")] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = highest
    return adjusted
