"""The page about many devices tells of the plan's check what the check has found."""

import json
from collections import defaultdict

import pytest

from tests.contract.source_tree import ROOT

WORDS = {"peak memory": "peak memory of a process"}


def found_ranges() -> dict[str, list[float]]:
    """Predicted over measured, by the page's word for the quantity."""
    path = ROOT / "benchmarks" / "results" / "scaling-check.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["sections"]["check"]["rows"]
    ranges = defaultdict(list)
    for _, quantity, _, _, ratio, _ in rows:
        name = quantity.rsplit(",", 1)[0]
        ranges[WORDS.get(name, name)].append(ratio)
    return dict(ranges)


@pytest.mark.parametrize("quantity", sorted(found_ranges()))
def test_the_page_tells_what_the_check_found(quantity: str) -> None:
    ratios = found_ranges()[quantity]
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    told = low if low == high else f"{low} to {high}"
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"| {quantity} | {len(ratios)} | {told} |" in page


def test_all_is_within_what_the_page_says() -> None:
    assert all(0.8 <= ratio <= 1.2 for ratios in found_ranges().values() for ratio in ratios)
