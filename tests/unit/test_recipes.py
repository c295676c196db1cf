"""Which settings a run gets when flags do not say."""

import inspect
import logging

import pytest

from distillation import DistillationTrainer
from distillation.commands.flags import build_parser
from distillation.commands.settings import parse_arguments
from distillation.config import LoopOptions
from distillation.recipes import RECIPES


def test_without_a_flag_of_the_method_the_best_recipe_is_used() -> None:
    arguments = parse_arguments(["--student_n_embd", "64", "--max_samples", "5"])
    assert arguments.recipe == "best"
    best = RECIPES["best"]
    for name, value in {**best.options, **best.training}.items():
        assert getattr(arguments, name) == value, name
    assert arguments.validation_tokens > 0


def test_a_flag_of_the_method_means_the_tutorials_algorithm() -> None:
    arguments = parse_arguments(["--lr_per_block", "5e-3"])
    assert arguments.recipe == "tutorial"
    assert arguments.lr_per_block == 5e-3
    assert arguments.distill_loss_type == "mse"
    assert arguments.polish_epochs == arguments.validation_tokens == 0
    assert not arguments.overfit_gate


def test_explicit_flags_always_win_also_with_their_default_value() -> None:
    plain = build_parser().parse_args([])
    flags = ["--recipe", "best", "--distill_loss_type", plain.distill_loss_type]
    arguments = parse_arguments([*flags, "--no_overfit_gate", "--polish_epochs", "1"])
    assert arguments.recipe == "best"
    assert arguments.distill_loss_type == "mse"
    assert arguments.polish_epochs == 1
    assert not arguments.overfit_gate
    assert arguments.init_from_teacher == RECIPES["best"].options["init_from_teacher"]


def test_the_parsers_defaults_are_the_tutorials() -> None:
    plain = vars(build_parser().parse_args([]))
    tutorial = RECIPES["tutorial"]
    values = {**tutorial.options, **tutorial.training}
    assert {name: plain[name] for name in values} == values


def test_the_log_says_what_the_recipe_chose(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    parse_arguments(["--recipe", "best", "--polish_lr", "7e-4"])
    assert "Recipe best" in caplog.text
    assert "init_from_teacher=" in caplog.text
    assert "Named by flags: polish_lr" in caplog.text


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_are_arguments_of_the_trainer(name: str) -> None:
    accepted = set(inspect.signature(DistillationTrainer.__init__).parameters)
    accepted |= set(LoopOptions.__annotations__)
    assert set(RECIPES[name].options) <= accepted
    assert set(RECIPES[name].training) <= set(
        inspect.signature(DistillationTrainer.train).parameters
    )
