"""The public surface is frozen: imports, signatures, defaults, flags, file names and messages.

``contract.json`` beside this file is the committed promise. Additions are free as long as they are
keyword-only settings with a default, or new flags.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract.source_tree import shipped_files

CONTRACT = json.loads(Path(__file__).with_name("contract.json").read_text(encoding="utf-8"))
STUDENTS = (
    "model.model_vanilla_distillation.VanillaTransformerModelDistillation",
    "model.model_token_factored_distillation.FactoredTransformerModelDistillation",
    "model.model_SASPV_distillation.SASPTransformerModelDistillation",
)
RETURNS = " returns"


def load(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def owner_path(name: str) -> str:
    """The dotted path of a public name that the contract gives without its module."""
    for module, names in CONTRACT["imports"].items():
        if name in names:
            return f"{module}.{name}"
    raise AssertionError(f"{name} is in no import of the contract")


def callables_named(entry: str) -> list[Callable[..., Any]]:
    owner, _, method = entry.partition(".")
    paths = STUDENTS if owner == "Student" else (owner_path(owner),)
    objects = [load(path) for path in paths]
    return [getattr(item, method) if method else item for item in objects]


def written_default(value: Any) -> Any:
    """A default as it stands in the contract, as the object it means."""
    torch = importlib.import_module("torch")
    named = {"torch.device('cpu')": torch.device("cpu"), "torch.optim.AdamW": torch.optim.AdamW}
    return named.get(value, value) if isinstance(value, str) else value


IMPORTS = [(module, name) for module, names in CONTRACT["imports"].items() for name in names]
SIGNATURES = [entry for entry in CONTRACT["signatures"] if not entry.endswith(RETURNS)]
FLAGS = [(module, flag) for module, flags in CONTRACT["flags"].items() for flag in flags]


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_import_path(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name, None) is not None


def test_every_public_name_is_one_object() -> None:
    """Each path of a name gives the same object: there is no second tree."""
    seen: dict[str, set[int]] = {}
    for module, name in IMPORTS:
        if name != "main":
            seen.setdefault(name, set()).add(id(load(f"{module}.{name}")))
    assert {name for name, objects in seen.items() if len(objects) > 1} == set()


def test_gpt_config_fields_and_defaults() -> None:
    config_class = load("config_distillation.GPTConfig")
    fields = dataclasses.fields(config_class)
    listed = list(CONTRACT["GPTConfig"].items())
    found = [(field.name, field.default) for field in fields]
    assert found[: len(listed)] == listed
    for extra in fields[len(listed) :]:
        assert extra.kw_only, f"GPTConfig.{extra.name} must be keyword-only"
        assert extra.default is not dataclasses.MISSING, f"GPTConfig.{extra.name} needs a default"


@pytest.mark.parametrize("entry", SIGNATURES)
def test_signature(entry: str) -> None:
    for function in callables_named(entry):
        parameters = list(inspect.signature(function).parameters.values())
        if parameters and parameters[0].name == "self":
            parameters = parameters[1:]
        check_listed(entry, parameters)


def check_listed(entry: str, parameters: list[inspect.Parameter]) -> None:
    listed = CONTRACT["signatures"][entry]
    if ["**"] in listed:
        assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD, f"{entry} takes **extra"
        listed = [item for item in listed if item != ["**"]]
    for position, (name, *default) in enumerate(listed):
        assert position < len(parameters), f"{entry} lacks {name}"
        found = parameters[position]
        assert found.name == name, f"{entry}: argument {position} is {found.name}, not {name}"
        assert found.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, f"{entry}: {name}"
        expected = written_default(default[0]) if default else inspect.Parameter.empty
        # Students are called as HF models are, also with inputs_embeds alone.
        if not (entry == "Student.forward" and name == "input_ids"):
            assert found.default == expected, f"{entry}: default of {name} is {found.default!r}"
    for extra in parameters[len(listed) :]:
        added_safely = extra.kind is inspect.Parameter.VAR_KEYWORD or (
            extra.kind is inspect.Parameter.KEYWORD_ONLY
            and extra.default is not inspect.Parameter.empty
        )
        assert added_safely, f"{entry}: {extra.name} must be keyword-only, with a default"


def build_parser(module: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(module).build_parser()
    return parser


def option(parser: argparse.ArgumentParser, flag: str) -> argparse.Action:
    matching = [action for action in parser._actions if flag in action.option_strings]
    assert matching, f"{flag} is missing"
    return matching[0]


@pytest.mark.parametrize(("module", "written"), FLAGS)
def test_flag(module: str, written: str) -> None:
    flag, _, rest = written.partition(" ")
    action = option(build_parser(module), flag)
    assert action.help, f"{flag} needs a help text"
    if rest.startswith("{"):
        promised = set(rest.strip("{}").split(","))
        assert promised <= set(action.choices or ()), f"{flag}: choices {action.choices}"


@pytest.mark.parametrize("module", CONTRACT["flags"])
def test_help_shows_every_default(module: str) -> None:
    parser = build_parser(module)
    assert "%(default)" not in parser.format_help()
    for action in parser._actions:
        flag, text, default = action.option_strings[0], action.help, action.default
        assert text, f"{flag} needs a help text"
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            continue  # no value: off, or not given
        if default is True:
            assert "(default: on)" in text or text.startswith("turns --"), flag
            continue
        shown = re.search(r"\(default: ([^,)]+)", text)
        assert shown, f"{flag} does not show its default {default}"
        assert type(default)(shown[1]) == default, f"{flag} shows {shown[1]}, it is {default}"


def test_switches_have_two_sides() -> None:
    parser = build_parser("examples.run_distillation_example")
    pairs = {
        "--freeze_previous_blocks": "--no_freeze_previous_blocks",
        "--train_lm_head": "--no_train_lm_head",
        "--initialize_head_from_teacher": "--no_initialize_head_from_teacher",
        "--use_stitching_layers": "--no_stitching_layers",
        "--stitching_layer_bias": "--no_stitching_layer_bias",
    }
    for positive, negative in pairs.items():
        field = positive.removeprefix("--")
        assert getattr(parser.parse_args([]), field) is True, f"{positive} is the default"
        assert getattr(parser.parse_args([positive]), field) is True
        assert getattr(parser.parse_args([negative]), field) is False, negative


def test_zero_samples_means_all() -> None:
    parser = build_parser("examples.run_distillation_example")
    assert parser.parse_args(["--max_samples", "0"]).max_samples == 0
    assert "all" in (option(parser, "--max_samples").help or "")


@pytest.mark.parametrize(
    ("keyword", "flag"),
    [("wd_per_block", "--weight_decay_per_block"), ("lm_head_wd", "--lm_head_weight_decay")],
)
def test_keywords_that_differ_from_their_flag_on_purpose(keyword: str, flag: str) -> None:
    train = load("distillation.DistillationTrainer").train
    assert keyword in inspect.signature(train).parameters
    assert option(build_parser("examples.run_distillation_example"), flag)


@pytest.mark.parametrize("name", CONTRACT["files"])
def test_file_name(name: str) -> None:
    assert any(f'"{name}"' in file.text for file in shipped_files()), name
