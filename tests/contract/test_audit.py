"""The floors in pyproject.toml close every hole we know of, and the audit can tell if not."""

import ast
import json
import re
from typing import Any

import pytest

from tests.contract.audit import ROOT, TABLE, floors, installed, problems, read_answer, version
from tests.contract.forbidden_calls import FORBIDDEN, violations

ADVISORIES: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))["advisories"]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_floors_meet_every_advisory() -> None:
    assert problems(ADVISORIES, floors(PYPROJECT)) == []


def test_the_pinned_versions_meet_them_too() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned: dict[str, Any] = {}
    for name, number in re.findall(r"^([\w.-]+)==([0-9.]+)", pins, flags=re.MULTILINE):
        pinned[name] = min(version(number), pinned.get(name, version(number)))
    known = [advisory for advisory in ADVISORIES if advisory["package"] in pinned]
    assert len(known) > 10
    assert problems(known, pinned) == []


@pytest.mark.parametrize("advisory", [a for a in ADVISORIES if "fixed" in a], ids=str)
def test_a_floor_below_a_fix_is_found(advisory: dict[str, Any]) -> None:
    lowest = {advisory["package"]: version(advisory["fixed"])}
    assert problems([advisory], lowest) == []
    below = (*version(advisory["fixed"])[:-1], version(advisory["fixed"])[-1] - 1, 9)
    assert problems([advisory], {advisory["package"]: below})
    assert problems([advisory], {})


def test_a_floor_at_the_last_affected_version_is_found() -> None:
    (advisory,) = [a for a in ADVISORIES if "last_affected" in a]
    last = version(advisory["last_affected"])
    assert problems([advisory], {"torch": last})
    assert not problems([advisory], {"torch": (*last, 1)})


@pytest.mark.parametrize("advisory", [a for a in ADVISORIES if "never_called" in a], ids=str)
def test_what_is_said_never_to_be_called_is_forbidden(advisory: dict[str, Any]) -> None:
    for name in advisory["never_called"]:
        assert name in FORBIDDEN
        assert violations(ast.parse(f"import {name}"), "distillation/sample.py")


def test_guards_of_ours_exist() -> None:
    for advisory in ADVISORIES:
        assert (ROOT / advisory.get("guarded_by", "")).exists()


def test_versions_compare_as_numbers() -> None:
    assert version("2.10.0") == version("2.10") > version("2.9.9")
    assert floors('"torch>=2.10", "torch>=2.6",') == {"torch": version("2.6")}


def test_an_audit_that_asked_nobody_is_not_a_clean_one() -> None:
    skipped = {"name": "torch", "skip_reason": "not found"}
    clean = {"name": "numpy", "version": "2.4.6", "vulns": []}
    assert read_answer([skipped, clean]) is None
    assert read_answer([skipped, clean, clean]) == ([], 1)
    assert read_answer([]) is None


def test_known_holes_are_told_but_for_those_nothing_reaches() -> None:
    holes = [
        {"id": "PYSEC-1", "fix_versions": ["9.9"], "aliases": ["CVE-1"]},
        {"id": "PYSEC-2025-194", "fix_versions": [], "aliases": ["CVE-2025-3000"]},
    ]
    answer = read_answer([{"name": "torch", "version": "2.13.0", "vulns": holes}])
    assert answer == (["torch 2.13.0: PYSEC-1, fixed in ['9.9']"], 0)


def test_builds_of_a_version_are_asked_about_as_that_version() -> None:
    assert not [line for line in installed() if "+" in line]
    assert any(line.startswith("torch==") for line in installed())
