"""docs/faults.md names a test for every fault, or says why there is none."""

import re

import pytest

from tests.contract.source_tree import ROOT

PAGE = ROOT / "docs" / "faults.md"
COUNTS = {"D": 19, "N": 11, "M": 5, "T": 16, "C": 17, "E": 7}
FAULTS = [
    "P06",
    "P11",
    *(f"{kind}{n:02d}" for kind, last in COUNTS.items() for n in range(1, last + 1)),
]
TEST = re.compile(r"`([\w/]+\.py)::(test_\w+)`( \(slow\))?")


def rows() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    return [row for row in found if row[0] != "ID" and set(row[0]) != {"-"}]


def test_every_fault_has_its_row_in_order() -> None:
    assert [row[0] for row in rows() if row[0]] == FAULTS
    assert all(len(row) == 5 for row in rows())


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]} {row[1][:30]}".strip())
def test_a_row_names_tests_that_exist_or_a_reason(row: list[str]) -> None:
    named = TEST.findall(row[4])
    assert named or re.fullmatch(r"none: .{10,}", row[4]), row
    assert row[4].count("::") == len(named), f"not read as a test: {row[4]}"
    for file, name, slow in named:
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        found = re.search(rf"((?:^@.*\n(?:^[ \])}}].*\n)*)*)^def {name}\(", text, re.M)
        assert found, f"{file} has no {name}"
        marks = rf"{found[1]}{''.join(re.findall('^pytestmark.*', text, re.M))}"
        whole = re.search(r"pytest\.mark\.slow", re.sub(r"param\(.*", "", marks)) is not None
        assert whole == bool(slow), f"{name} {'is' if whole else 'is not'} slow"
