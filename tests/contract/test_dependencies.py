"""docs/dependencies.md names every dependency and no other, and the oldest set is the floors."""

import re

from packaging.requirements import Requirement
from packaging.version import Version

from tests.contract.audit import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def requirements(text: str) -> list[Requirement]:
    """Those in quotes of a part of pyproject.toml (Python 3.10 reads no TOML)."""
    return [Requirement(found) for found in re.findall(r'"([\w-]+[><=~!][^"]*)"', text)]


def part(start: str, end: str) -> str:
    return PYPROJECT.split(start, 1)[1].split(end, 1)[0]


ALWAYS = requirements(part("\ndependencies = [", "\n]"))
OPTIONAL = requirements(part("[project.optional-dependencies]", "\n[tool."))


def test_the_page_names_what_is_installed_and_nothing_else() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    table = page.split("## What is used", 1)[1].split("\n## ", 1)[0]
    named = dict(re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|", table, flags=re.MULTILINE))
    assert {name for name, where in named.items() if where == "always"} == {r.name for r in ALWAYS}
    assert named.keys() == {r.name for r in (*ALWAYS, *OPTIONAL)}


def test_the_oldest_set_is_the_floors() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", lines, flags=re.MULTILINE))
    floors = {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in ALWAYS}
    assert {name: Version(v) for name, v in pins.items()} == {
        name: Version(v) for name, v in floors.items()
    }


def test_pins_are_within_what_is_allowed() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    allowed = {r.name: r.specifier for r in (*ALWAYS, *OPTIONAL)}
    pins = [
        (name, number)
        for name, number in re.findall(r"^([\w-]+)==([0-9.]+)", lines, flags=re.MULTILINE)
        if name in allowed
    ]
    assert len(pins) > 20
    assert [(name, number) for name, number in pins if number not in allowed[name]] == []
