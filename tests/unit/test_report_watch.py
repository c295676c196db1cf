"""The live view: what it says of a run in every state, on a terminal and elsewhere, and its end."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cleangpt.errors import InputError
from cleangpt.integrity import sealed
from cleangpt.run_lock import holder_lives, locked
from distillation.report.run_files import read_run
from distillation.report.watch import (
    Meter,
    View,
    lines_of,
    sparkline,
    steps_done,
    steps_in_all,
    watch,
)
from tests.contract.source_tree import ROOT
from tests.report_samples import HOSTILE, manifest_of, stage_row, stage_rows, write_run

POLISH: list[dict[str, Any]] = [
    {"event": "step", "stage": "polish", "step": s, "loss": 9.0 - s, "tokens_per_second": 1234.0}
    for s in (2, 4, 6)
]


def going_on(folder: Path, **changes: Any) -> Path:
    values = {"status": "running", "total_steps": 100, "results": None, **changes}
    return write_run(folder, stage_rows(False), going_on=POLISH, **values)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_line_says_stage_step_loss_speed_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_run(going_on(tmp_path / "run"))
    assert steps_done(run) == 66
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter()
    meter.take(50)
    now[0] += 8
    first, bar, *stages = lines_of(run, meter, 100)
    assert first == (
        "run, running, 66/100 steps, polish step 6: loss 3, 1,234 tokens/s, 2.00 steps/s, ETA 00:17"
    )
    assert bar.endswith("66%")
    assert stages[-1].startswith("polish     now        6 steps  loss        3  ")
    assert [line.split()[:2] for line in stages] == [
        ["block-00", "done"], ["block-01", "done"], ["block-02", "done"], ["polish", "now"]
    ]  # fmt: skip
    now[0] += 1000
    assert "nothing new for 16:40" in lines_of(run, meter, 100)[0]


def test_steps_are_counted_as_the_run_counts_them(tmp_path: Path) -> None:
    more = {"epochs_per_block": 2, "gradient_accumulation_steps": 2}
    for schedule, steps, total in (
        ("sequential", 66, 100), ("parallel_local", 26, 100), ("decoupled", 66, 100 + 3 * 2 * 6)
    ):  # fmt: skip
        settings = {"schedule": schedule, **more}
        run = read_run(going_on(tmp_path / schedule, settings=settings, data={"batches": 11}))
        assert (steps_done(run), steps_in_all(run)) == (steps, total)
    unknown = going_on(tmp_path / "unknown", settings={"schedule": "decoupled"})
    assert lines_of(read_run(unknown), Meter(), 80)[0].startswith("unknown, running, 66 steps, ")


def test_blocks_that_learn_apart_are_seen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [], status="running", settings={"schedule": "decoupled"})
    part = run / "checkpoints" / "block-01"
    part.mkdir(parents=True)
    event = {"event": "step", "stage": "block-01", "step": 7, "loss": 0.5, "tokens_per_second": 9}
    (part / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    assert "block-01 step 7: loss 0.5" in lines_of(read_run(run), Meter(), 80)[0]


def test_hostile_names_move_no_cursor(tmp_path: Path) -> None:
    rows = [stage_row(HOSTILE)]
    run = write_run(tmp_path / "run", rows, status="failed", reason=HOSTILE)
    for line in lines_of(read_run(run), Meter(), 80):
        assert not {"\x1b", "\x07", "\n", "\u202e"} & set(line)


def test_a_sparkline_keeps_shape_and_width() -> None:
    falling = [1000 / step for step in range(1, 1001)]
    line = sparkline(falling, 20, "01234")
    assert len(line) == 20
    assert line[0] == "4"
    assert list(line) == sorted(line, reverse=True)
    assert sparkline([math.nan], 5) == ""
    assert sparkline([2.0, 2.0], 5, "ab") == "aa"


def test_a_terminal_is_drawn_over_and_other_output_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = View()
    for lines in (["one", "two"], ["one", "two"], ["three"]):
        view.show(lines)
    assert capsys.readouterr().out == "one\nthree\n"
    assert not view.is_terminal
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    view = View()
    view.show(["one", "two"])
    view.show(["three"])
    assert shown.getvalue() == "one\ntwo\n\x1b[2F\x1b[Jthree\n"


def test_a_finished_run_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(write_run(tmp_path / "run"), 60.0)
    assert capsys.readouterr().out == "run, done, 100/100 steps, 00:09 in all\n"
    with pytest.raises(InputError):
        watch(tmp_path / "nowhere", 1.0)
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    watch(tmp_path / "run", 60.0)
    assert "report: python -m distillation.report" in shown.getvalue()


def test_a_process_that_is_no_more_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = going_on(tmp_path / "run")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run / ".lock").write_text(f"pid {dead.pid} on {os.uname().nodename}")
    assert holder_lives(run) is False
    watch(run, 60.0)
    assert capsys.readouterr().out.startswith("run, killed, 66/100 steps")
    (run / ".lock").write_text(f"pid {dead.pid} on another-machine")
    assert holder_lives(run) is None
    with locked(run):
        assert holder_lives(run) is True


def watching(run: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "distillation.report", "--watch", str(run), "--interval", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)


def test_the_command_follows_a_run_to_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    process = watching(run)
    assert process.stdout is not None
    assert "waiting for a run to begin" in process.stdout.readline()
    going_on(tmp_path / "made")
    for name in ("config.json", "metrics.jsonl", "manifest.json"):
        (tmp_path / "made" / name).rename(run / name)
    assert "polish step 6: loss 3" in process.stdout.readline()
    ended = manifest_of(stage_rows(), total_steps=100)
    (run / "new").write_text(json.dumps(sealed(ended)))
    (run / "new").rename(run / "manifest.json")
    rest, errors = process.communicate(timeout=60)
    assert rest.splitlines()[-1] == "run, done, 100/100 steps, 00:09 in all"
    assert (process.returncode, errors) == (0, "")


def test_ctrl_c_ends_the_view(tmp_path: Path) -> None:
    process = watching(going_on(tmp_path / "run"))
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(errors.splitlines()) == 2
