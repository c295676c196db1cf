"""The statistics of repeated measurements: a median, and the range it lies in."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Repeated values of one quantity.

    Args:
        minimum: The smallest.
        median: The middle one.
        maximum: The largest.
        count: How many there were.
    """

    minimum: float
    median: float
    maximum: float
    count: int

    def __str__(self) -> str:
        """The median, and the range if there were several."""
        if self.count == 1:
            return number(self.median)
        return f"{number(self.median)} ({number(self.minimum)} to {number(self.maximum)})"


def spread(values: Iterable[float]) -> Spread:
    """Return the spread of at least one value.

    Example:
        >>> str(spread([1.0, 3.0, 2.0]))
        '2 (1 to 3)'
    """
    found = list(values)
    return Spread(min(found), statistics.median(found), max(found), len(found))


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """The spread of ``slow / fast``, each pair measured side by side in one repeat.

    Raises:
        ValueError: If the lengths differ.
    """
    return spread(above / below for above, below in zip(slow, fast, strict=True))


def relative_difference(a: float, b: float) -> float:
    """``|a - b|`` as a share of the larger magnitude; 0 if both are 0."""
    largest = max(abs(a), abs(b))
    return abs(a - b) / largest if largest else 0.0


def number(value: float) -> str:
    """Three significant digits, without an exponent in the usual range.

    Example:
        >>> number(1234.5), number(0.01234), number(3.0)
        ('1,234', '0.0123', '3')
    """
    if value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.2e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
