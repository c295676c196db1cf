"""The doctor's verdicts are what a run with the same flags would meet."""

from pathlib import Path

import pytest

from cleangpt.cli import run_command
from distillation.commands.doctor import main
from tests.contract.local_hub import save_tiny_gpt2, write_stories

SMALL = [
    *("--block_size", "32", "--batch_size", "4", "--threads", "1"),
    *("--student_n_embd", "16", "--student_n_head", "2"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("doctor")
    save_tiny_gpt2(place / "teacher", blocks=2)
    write_stories(place / "stories")
    return place


def examined(place: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    data = ["--teacher_model_name_or_path", str(place / "teacher"), "--no_token_cache"]
    data += ["--dataset_name", str(place / "stories"), "--output_dir", str(place / "run")]
    code = run_command(main, [*data, *SMALL, *flags])
    return code, capsys.readouterr().out


def test_a_run_that_works_is_said_to_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    code, out = examined(place, capsys, "--recipe", "best", "--lm_head_epochs", "1")
    assert code == 0, out
    assert "0 failures" in out
    for stage in ("block-00", "block-01", "lm-head", "polish"):
        assert f"{stage} " in out
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--student_n_embd 18 --student_n_head 4", 2, ["FAIL  student", "-     stages"]),
        ("--no_stitching_layers", 2, ["FAIL  student", "Dimension mismatch"]),
        ("--dataset_name nowhere.txt", 3, ["FAIL  text", "-     windows"]),
        ("--teacher_model_name_or_path builtin --block_size 300", 0, ["warn  teacher", "256"]),
        ("--output_dir PLACE/teacher/config.json", 5, ["FAIL  output", "-     cost"]),
    ],
)
def test_each_refusal_is_the_runs_own(
    place: Path, capsys: pytest.CaptureFixture[str], flags: str, code: int, words: list[str]
) -> None:
    found, out = examined(place, capsys, *flags.replace("PLACE", str(place)).split())
    for word in words:
        assert word in out
    if code:
        assert found == code


def test_names_from_outside_cannot_reach_the_terminal(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = examined(place, capsys, "--teacher_model_name_or_path", "a\x1b[31m\nok    faked")
    assert "\x1b" not in out
    assert "\nok    faked" not in out


def test_settings_are_printed_and_a_plan_is_examined_like_a_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = examined(place, capsys, "--print_config")
    assert code == 0
    assert out.startswith("# Settings of")
    assert "\nok " not in out
    code, out = examined(place, capsys, "--plan", "--recipe", "tutorial")
    assert code == 0, out
    assert "ok    stages" in out
