"""Settings in a file: read as their flags read them, refused with the line, written to be read."""

from pathlib import Path

import pytest
import yaml

from cleangpt.cli import run_command
from cleangpt.errors import UsageError
from distillation.commands.distil import main
from distillation.commands.settings import parse_arguments

ALL_KINDS = [
    [],
    ["--recipe", "best", "--polish_lr", "7e-4", "--no_overfit_gate"],
    ["--lr_per_block", "1e-3,5e-4", "--layer_map", "0,0,1", "--blocks", "3-5,0", "--no_packing"],
    ["--start_student", "x", "--teacher_device_map", "cuda=20,cpu=8,disk", "--precision", "bf16"],
    [
        "--student_bias",
        "--student_n_layer",
        "3",
        "--activation_cache_gb",
        "0.5",
        "--plan_tokens=1e9",
    ],
    ["--dataset_name", "a: b # c\x1b[0m", "--output_dir", "yes", "--dataset_config_name", "007"],
    ["--token_cache", "there", "--no_train_lm_head", "--streaming", "--seed", "3"],
]


def settings(argv: list[str]) -> dict[str, object]:
    own = vars(parse_arguments(argv))
    return {k: v for k, v in own.items() if k not in ("config", "print_config", "settings_text")}


def written(folder: Path, text: str) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


@pytest.mark.parametrize("argv", ALL_KINDS)
def test_what_is_printed_is_what_it_was_printed_from(argv: list[str], tmp_path: Path) -> None:
    text = parse_arguments(argv).settings_text
    assert settings(written(tmp_path, text)) == settings(argv)


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    text = "recipe: best\npolish_epochs: 7\nlr_per_block: [1e-3, 2.5e-4]\nseed: 5\n"
    arguments = parse_arguments([*written(tmp_path, text), "--seed", "6"])
    assert (arguments.seed, arguments.polish_epochs) == (6, 7)
    assert arguments.lr_per_block == [1e-3, 2.5e-4]
    assert arguments.distill_loss_type == "nmse"
    shown = arguments.settings_text
    for line in ("seed: 6  # flag", "polish_epochs: 7  # file", "threads: 0  # default"):
        assert line in shown
    assert "distill_loss_type: nmse  # recipe best" in shown


def test_a_flag_takes_the_place_of_what_it_excludes(tmp_path: Path) -> None:
    argv = [*written(tmp_path, "token_cache: there\npacking: false\n"), "--no_token_cache"]
    arguments = parse_arguments([*argv, "--packing"])
    assert arguments.packing
    assert arguments.no_token_cache
    assert arguments.token_cache is None


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("seed: 1\nlr_per_blok: 1e-3", r"line 2: unknown setting lr_per_blok\.", "lr_per_block"),
        ("seed: -1", "line 1: seed: '-1' is not a whole number", "--help says what --seed takes"),
        ("precision: fp8", "line 1: precision: invalid choice: 'fp8'", "--precision"),
        ("seed: 1\nseed: 2", "line 2: seed stands there twice", "Leave one"),
        ("packing: 3", "line 1: packing is '3'", "true or false"),
        ("seed: true", "line 1: seed is 'true'", "not true or false"),
        ("seed: {a: 1}", "line 1: seed is no plain value", "value or list"),
        ("config: other.yaml", "unknown setting config", "--help"),
        ("- seed", "holds no names with values", "one flag per line"),
        ("seed: [1", r"line 1: no YAML", "one flag per line"),
        (
            "output_dir: !!python/object/apply:os.system [x]",
            "line 1: output_dir is no plain value",
            "list",
        ),
        ("output_dir: !mine x", "line 1: output_dir is no plain value", "value or list"),
        ("token_cache: a\nno_token_cache: true", "no_token_cache and token_cache exclude", "Keep"),
    ],
)
def test_what_no_flag_takes_is_refused(
    text: str, cause: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = written(tmp_path, text)
    with pytest.raises(UsageError, match=cause) as error:
        parse_arguments(argv)
    assert remedy in error.value.remedy
    assert run_command(main, argv) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml cannot be read: No such file"):
        parse_arguments(["--config", str(tmp_path / "nowhere.yaml")])


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("distill_loss_type: cosine\npolish_epochs: 2\n", encoding="utf-8")
    arguments = parse_arguments(["--recipe", str(own), "--polish_epochs", "3"])
    assert (arguments.distill_loss_type, arguments.polish_epochs) == ("cosine", 3)
    assert arguments.recipe == str(own)
    own.write_text("output_dir: there\n", encoding="utf-8")
    with pytest.raises(UsageError, match="output_dir is nothing a recipe says"):
        parse_arguments(["--recipe", str(own)])
    with pytest.raises(UsageError, match="There is no recipe bestt") as error:
        parse_arguments(["--recipe", "bestt"])
    assert "tutorial or best" in error.value.remedy


def test_settings_are_printed_and_nothing_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, ["--print_config", "--output_dir", str(tmp_path / "run")]) == 0
    assert "recipe: best" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_evaluation_takes_a_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distillation.evaluation.evaluate_distilled_model import main as evaluate

    text = "model_path: student\nbaseline_path: [a, b]\nmax_tokens: 100\n"
    argv = [*written(tmp_path, text), "--print_config", "--max_tokens", "200"]
    assert run_command(evaluate, argv) == 0
    shown = capsys.readouterr().out
    assert "baseline_path: [a, b]  # file" in shown
    assert "max_tokens: 200  # flag" in shown
    assert run_command(evaluate, [*written(tmp_path, shown), "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(shown)
    assert run_command(evaluate, ["--max_tokens", "3"]) == 2
    assert "required: --model_path" in capsys.readouterr().err


def test_a_run_repeats_after_the_file_of_its_recipe_is_gone(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("polish_epochs: 4\nlr_per_block: [1e-3, 2e-3]\n", encoding="utf-8")
    argv = ["--recipe", str(recipe), "--seed", "3"]
    before, text = settings(argv), parse_arguments(argv).settings_text
    recipe.unlink()
    assert settings(written(tmp_path, text)) == before
    with pytest.raises(UsageError, match="There is no recipe"):
        parse_arguments(written(tmp_path, f"recipe: {recipe}\n"))  # here it decides the rest
    with pytest.raises(UsageError, match="There is no recipe"):
        parse_arguments([*written(tmp_path, text), "--recipe", "nothing.yaml"])


def test_a_recipe_that_decides_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    everything = written(tmp_path, parse_arguments(["--recipe", "best"]).settings_text)
    parse_arguments(everything)
    assert "decides nothing" not in caplog.text
    parse_arguments([*everything, "--recipe", "tutorial"])
    assert "--recipe tutorial decides nothing" in caplog.text


def test_one_value_is_no_list_and_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 1: dataset_name is a list"):
        parse_arguments(written(tmp_path, "dataset_name: [a, b]\n"))
    with pytest.raises(UsageError, match="gone.yaml cannot be read: No such"):
        parse_arguments(["--config", str(tmp_path / "gone.yaml")])
