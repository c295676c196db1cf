"""No code of ours runs what a file says, starts a shell, or speaks to the network by itself."""

import ast

import pytest

from tests.contract.forbidden_calls import (
    FORBIDDEN,
    FORBIDDEN_METHODS,
    MAY_IMPORT_BY_NAME,
    violations,
)
from tests.contract.source_tree import ROOT, shipped_files


def test_nothing_forbidden_is_called() -> None:
    found = {file.name: violations(file.tree, file.name) for file in shipped_files()}
    assert len(found) > 100
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "f = exec",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch as t\nload = t.load",
        "from torch import load",
        "import torch.serialization",
        "from torch import serialization\nserialization.add_safe_globals([1])",
        "anything.add_safe_globals([1])",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "import torch\ntorch.jit.load('x')",
        "import torch\ntorch.export.load('x')",
        "def f():\n    import pickle",
        "from yaml import load",
        "import yaml\nyaml.safe_load('x')",
        "import os\nos.system('ls')",
        "from os import system as run\nrun('ls')",
        "import subprocess",
        "run(['ls'], shell=True)",
        "import tempfile\ntempfile.mktemp()",
        "load('x', trust_remote_code=True)",
        "read('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import urllib.request\nurllib.request.urlopen('x')",
        "import requests",
        "from http import client",
        "hub.get_session().get('x')",
        "archive.extractall('x')",
        "input('sure?')",
        "from jinja2 import Template",
        "import jinja2\njinja2.Environment(loader=None)",
        "from jinja2 import Environment\nEnvironment(autoescape=False)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module\nimport_module('pickle')",
    ],
)
def test_every_rule_bites(source: str) -> None:
    assert violations(ast.parse(source), "distillation/sample.py")


def test_torch_load_is_restricted_even_where_it_may_stand() -> None:
    where = "cleangpt/restricted_load.py"
    assert not violations(ast.parse("import torch\ntorch.load(x, weights_only=True)"), where)
    for call in ("torch.load(x)", "torch.load(x, weights_only=flag)"):
        assert violations(ast.parse(f"import torch\n{call}"), where)


@pytest.mark.parametrize("call", ["load(x, yaml.SafeLoader)", "unsafe_load(x)", "Loader"])
def test_yaml_builds_nothing_even_where_it_may_stand(call: str) -> None:
    where = "cleangpt/settings_file.py"
    assert not violations(ast.parse("import yaml\nyaml.compose(x, yaml.SafeLoader)"), where)
    assert violations(ast.parse(f"import yaml\nyaml.{call}"), where)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "import torch\ntorch.compile(model)\nself.compile = 1\nmodel.eval()",
        "import json\njson.load(file)",
        "load(x, trust_remote_code=flag, weights_only=True)",
        "from jinja2 import Environment\nEnvironment(autoescape=True)",
        "code = 1\nprint(code)",
    ],
)
def test_what_only_looks_like_it_passes(source: str) -> None:
    assert violations(ast.parse(source), "distillation/sample.py") == []


def test_every_exception_is_still_needed() -> None:
    allowed = {f for files in (*FORBIDDEN.values(), *FORBIDDEN_METHODS.values()) for f in files}
    for name in allowed | MAY_IMPORT_BY_NAME:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        assert violations(tree, "distillation/elsewhere.py"), f"{name} needs no exception"
