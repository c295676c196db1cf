"""The doctor's verdicts are what a run with the same flags would meet."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset
from transformers.utils import logging as transformers_logging

from cleangpt.cli import run_command
from cleangpt.data import DistillationDataCollator, TextSource, make_dataloader
from distillation.cache_plan import positions_in
from distillation.commands import doctor
from distillation.commands.doctor import main
from distillation.commands.dry_steps import few_threads
from distillation.commands.settings import parse_arguments
from tests.byte_tokenizer import make_tokenizer
from tests.contract.local_hub import save_tiny_gpt2, write_stories
from tests.report_samples import write_run

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


def flags_of(place: Path) -> list[str]:
    data = ["--teacher_model_name_or_path", str(place / "teacher"), "--no_token_cache"]
    data += ["--dataset_name", str(place / "stories"), "--output_dir", str(place / "run")]
    return [*data, *SMALL]


def examined(place: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = run_command(main, [*flags_of(place), *flags])
    return code, capsys.readouterr().out


def test_a_run_that_works_is_said_to_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    transformers_logging.enable_progress_bar()
    code = run_command(main, [*flags_of(place), "--recipe", "best", "--lm_head_epochs", "1"])
    out, err = capsys.readouterr()
    assert "it/s" not in err
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


def test_a_long_text_is_judged_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SAMPLE_CHARACTERS", 10)
    source = TextSource(["abcdef", "ghijklmn", "op" * 3], "here", "train", "text", "0", ())
    sample, times = doctor.sample_of(source)
    assert (sample.texts, times) == (["abcdef", "ghij"], 2.0)
    short = replace(source, texts=["abcdef"])
    assert doctor.sample_of(short) == (short, 1)
    collator = DistillationDataCollator(make_tokenizer(eos_token="<end>"), 4)
    loader = make_dataloader(TensorDataset(torch.zeros(2, 4)), collator, 3)
    assert len(doctor.repeated(loader, 5.5, 0).dataset) == 11
    assert positions_in(doctor.repeated(loader, 5.5, 0)) == 44


def test_the_steps_of_a_small_model_take_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with few_threads(torch.nn.Linear(2, 2)):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_was_assumed_about_the_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"text": "a b c"}\n' * 40)
    arguments = parse_arguments(["--dataset_name", str(tmp_path / "lines.jsonl")])
    assert "cut by document into" in doctor.look_at_text(arguments)[1].found


def verdict(path: Path, *flags: str) -> str:
    own = doctor.Examination()
    arguments = parse_arguments(["--output_dir", str(path), *flags])
    own.check("output", lambda: doctor.look_at_output(arguments))
    return " ".join([*own.verdicts[0].lines(), f"exit {own.exit_code}"])


def test_a_run_that_is_there_is_told_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", status="stopped")
    (run / ".lock").write_text(f"pid {os.getpid()} on {os.uname().nodename}")  # and let go
    assert "already holds a run" in verdict(run)
    assert "unfinished (stopped)" in verdict(run)
    assert verdict(run, "--resume").startswith("ok    output")
    assert "unfinished (stopped)" in verdict(run, "--resume")
    assert "warn  output" in verdict(run, "--overwrite")
    assert "--resume instead of --overwrite" in verdict(run, "--overwrite")
    assert "unfinished (killed)" in verdict(write_run(tmp_path / "killed", status="running"))
    assert "there is done." in verdict(write_run(tmp_path / "done"), "--resume")


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_run_that_another_process_holds_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", status="running")
    code = (
        "import sys, pathlib; from cleangpt.run_lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        told = f"(pid {other.pid} on "
        plain, resumed = verdict(run), verdict(run, "--resume")
        other.communicate()
    assert f"Another run holds it now {told}" in plain
    assert plain.endswith("exit 2")
    assert f"FAIL  output     Another run holds {run} {told}" in resumed
    assert resumed.endswith("exit 5")
    assert "unfinished (killed)" in verdict(run, "--resume")
