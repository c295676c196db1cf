"""SECURITY.md promises only what a test here shows."""

import ast
import re

import pytest

from tests.contract.source_tree import ROOT

TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
CLAIMS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))


@pytest.mark.parametrize(("file", "test"), CLAIMS)
def test_each_test_it_names_exists(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_its_test() -> None:
    promises = TEXT.split("## Promises, each with its tests")[1].split("## Checksums")[0]
    points = re.split(r"\n- ", promises)[1:]
    assert len(points) > 10
    assert [point for point in points if "`tests/" not in point] == []


def test_paths_it_names_exist() -> None:
    for name in set(re.findall(r"`((?:tests|cleangpt|distillation)/[\w/.]+)`", TEXT)):
        assert (ROOT / name).exists(), name
