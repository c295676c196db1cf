"""Charts as inline SVG: scales, axes and marks, coloured by the classes of the page's style.

matplotlib draws the PNG files; a page needs less and more: colours that follow the reader's light
or dark theme, text that is text, a name for every mark under the pointer, and a tenth of the bytes.
The tree is built with ``xml.etree``, which escapes; control characters go before. No file is read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from cleangpt.safe_text import clean_line

Number = int | float
CHARACTER_WIDTH = 7.4
"""Of a character at the size a phone gets, on average; to reserve room for labels."""


@dataclass(frozen=True)
class Scale:
    """A range of values on a range of places, linear or logarithmic.

    Args:
        low: The value at ``start``.
        high: The value at ``end``; above ``low``.
        start: Place of ``low``, in units of the picture.
        end: Place of ``high``.
        is_log: Whether equal ratios take equal room.
    """

    low: Number
    high: Number
    start: Number
    end: Number
    is_log: bool = False

    def __call__(self, value: Number) -> float:
        """The place of a value, held inside the range."""
        if self.is_log:
            low, high = math.log10(self.low), math.log10(self.high)
            share = (math.log10(max(value, 1e-300)) - low) / (high - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """Round values inside the range, about ``count`` of them."""
        if self.is_log:
            return _log_ticks(self.low, self.high, count)
        step = _round_step((self.high - self.low) / max(1, count))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def scale_for(
    values: Sequence[Number],
    start: Number,
    end: Number,
    *,
    from_zero: bool = False,
    may_be_log: bool = False,
) -> Scale:
    """A scale with some room around the finite values.

    Args:
        values: What is to be shown.
        start: Place of the lowest value.
        end: Place of the highest one.
        from_zero: Whether a linear scale begins at 0, as bars must.
        may_be_log: Whether values over more than a decade and a half take a logarithmic scale.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if may_be_log and low > 0 and 30 < high / low < 1e100:
        room = (high / low) ** 0.06
        return Scale(low / room, high * room, start, end, is_log=True)
    if from_zero:
        low = min(0.0, low)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(low if from_zero else low - room, high + room, start, end)


def _round_step(rough: Number) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next((power * factor for factor in (1, 2, 5) if power * factor >= rough), power * 10)


def _log_ticks(low: Number, high: Number, count: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if high / low < 6:  # too short for decades
        return Scale(low, high, 0, 1).ticks(count)
    factors = (1,) if last - first > 3 else (1, 3) if last - first > 2 else (1, 2, 5)
    found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    inside = [value for value in found if low <= value <= high]
    return inside[:: max(1, math.ceil(len(inside) / (count + 1)))]


def short_number(value: Number) -> str:
    """A number for an axis or a mark: three figures, thousands as k, millions as M.

    Example:
        >>> short_number(1234), short_number(0.05), short_number(3_111_936), short_number(0)
        ('1.23k', '0.05', '3.11M', '0')
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


class Chart:
    """One picture under construction.

    Args:
        title: What it shows, for those who cannot see it.
        width: Units of its coordinates; the style scales it to the page.
        height: The same.
    """

    def __init__(self, title: str, width: Number, height: Number) -> None:
        self.width, self.height = width, height
        size = f"0 0 {_place(width)} {_place(height)}"
        self.root = ET.Element("svg", {"viewBox": size, "role": "img", "class": "chart"})
        self.root.set("aria-label", clean_line(title, 1000))
        self.root.set("style", f"max-width:{round(width * 1.25)}px")

    def add(self, tag: str, mark: str = "", hint: str = "", **places: Number | str) -> ET.Element:
        """Add a shape.

        Args:
            tag: The SVG element.
            mark: Its classes.
            hint: What the pointer shows over it.
            **places: Its attributes; "_" stands for "-".
        """
        attributes = {
            name.replace("_", "-"): value if isinstance(value, str) else _place(value)
            for name, value in places.items()
        }
        element = ET.SubElement(self.root, tag, attributes)
        if mark:
            element.set("class", mark)
        if hint:
            ET.SubElement(element, "title").text = clean_line(hint, 300)
        return element

    def text(self, x: Number, y: Number, words: str, mark: str = "", limit: int = 60) -> None:
        """Write words; classes ``end`` and ``mid`` anchor them to the right and in the middle."""
        self.add("text", mark, x=x, y=y).text = clean_line(words, limit)

    def line(self, points: Sequence[tuple[Number, Number]], mark: str, hint: str = "") -> None:
        """Join points that are already places; a single one becomes a dot."""
        if len(points) == 1:
            self.add("circle", f"{mark} dot", hint, cx=points[0][0], cy=points[0][1], r=2.4)
        elif points:
            joined = " ".join(f"{_place(x)},{_place(y)}" for x, y in points)
            self.add("polyline", f"{mark} line", hint, points=joined)

    def y_axis(self, scale: Scale, left: Number, right: Number, count: int = 4) -> None:
        """Grid lines from left to right, with their values."""
        for value in scale.ticks(count):
            place = scale(value)
            self.add("line", "grid", x1=left, x2=right, y1=place, y2=place)
            self.text(left - 6, place + 3.8, short_number(value), "tick end")

    def x_axis(self, scale: Scale, top: Number, bottom: Number, count: int = 4) -> None:
        """Grid lines from top to bottom, with their values."""
        for value in scale.ticks(count):
            place = scale(value)
            self.add("line", "grid", x1=place, x2=place, y1=top, y2=bottom)
            self.text(place, bottom + 15, short_number(value), "tick mid")

    def markup(self) -> str:
        """The picture as text for a page."""
        return ET.tostring(self.root, encoding="unicode")


def _place(value: Number) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
