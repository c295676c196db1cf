"""Runs that trackers follow: what each of them then holds, read with its own reader."""

import csv
import importlib.util
import json
import logging
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.errors import EnvironmentProblem, UsageError
from cleangpt.metrics_log import MetricsLog
from cleangpt.runtime.faultpoints import faultpoint
from cleangpt.trackers import TRACKERS, TensorBoard, check_trackers
from distillation import DistillationTrainer
from examples.run_distillation_example import main
from tests.builders import batches, tiny_student, tiny_teacher

SHORT: dict[str, Any] = {"epochs_per_block": 1, "lr_per_block": 1e-2, "lm_head_epochs": 1}


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def trainer(folder: Path, *track: str, **options: Any) -> DistillationTrainer:
    return DistillationTrainer(
        tiny_teacher(),
        tiny_student(),
        None,
        batches(4),
        output_dir=folder / "run",
        log_interval=1,
        validation_dataloader=batches(1),
        precision="fp32",
        track=track,
        **options,
    )


def step_events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The losses of every stage, from metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in MetricsLog(run / "metrics.jsonl").records():
        if record["event"] == "step":
            found.setdefault(record["stage"], []).append((record["step"], record["loss"]))
    return found


def board(run: Path, tag: str) -> dict[str, list[tuple[int, float]]]:
    """A curve of every stage, from TensorBoard's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in sorted((run / "tensorboard").iterdir()):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        scalars = events.Scalars(tag)
        found[folder.name] = [(each.step, each.value) for each in scalars]
    return found


def same_curves(one: Any, other: Any) -> bool:
    """TensorBoard keeps float32."""
    return {k: [(s, pytest.approx(v, rel=1e-6)) for s, v in c] for k, c in one.items()} == other


def test_the_table_has_the_curves(tmp_path: Path) -> None:
    trainer(tmp_path).train(**SHORT)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["event"] == "step":
            assert float(row["gradient_norm"]) > 0
            own.setdefault(row["stage"], []).append((int(row["at"]), float(row["loss"])))
    assert own == step_events(tmp_path / "run")
    kinds = {(row["stage"], row["event"]) for row in rows}
    assert kinds == {(stage, e) for stage in own for e in ("step", "epoch", "validation")}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "metrics.csv" in manifest["files"]


def test_a_number_that_is_none_is_an_empty_field(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("step", stage="block 0", step=1, loss=float("nan"), gradient_norm=2.0)
    log.write("chain", chained_errors=[0.5])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[1:] == ["block 0,step,1,,2.0,,"]


def test_the_table_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("step", stage="block 0", step=1, loss=3.0)
    size = log.size()
    kept = (tmp_path / "metrics.csv").read_bytes()
    log.write("step", stage="block 0", step=2, loss=2.0)
    log.go_on(size)
    assert (tmp_path / "metrics.csv").read_bytes() == kept


@needs("tensorboard")
def test_tensorboard_holds_every_curve(tmp_path: Path) -> None:
    trainer(tmp_path, "tensorboard").train(**SHORT)
    run = tmp_path / "run"
    assert same_curves(board(run, "loss"), step_events(run))
    assert all(len(curve) == 2 for curve in board(run, "validation_loss").values())
    assert all(len(curve) == 1 for curve in board(run, "epoch_loss").values())


@needs("tensorboard")
def test_a_resumed_run_goes_on_in_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed two steps after a checkpoint, it does them again, and they stand there once."""

    def killed(name: str, number: int = 0) -> None:
        if (name, number) == ("step.taken", 7):
            raise KeyboardInterrupt
        faultpoint(name, number)

    with monkeypatch.context() as patch:
        patch.setattr("distillation.journal.faultpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, "tensorboard", checkpoint_steps=5).train(**SHORT)
    run = tmp_path / "run"
    before = board(run, "loss")
    trainer(tmp_path, "tensorboard", checkpoint_steps=5, resume=True).train(**SHORT)
    after = board(run, "loss")
    assert same_curves(after, step_events(run))
    assert all(after[stage][: len(curve)] == curve for stage, curve in before.items())


@needs("tensorboard")
def test_blocks_that_learn_apart_are_shown_too(tmp_path: Path) -> None:
    own = trainer(tmp_path, "tensorboard", schedule="decoupled", block_inputs="teacher")
    own.train(**SHORT)
    assert same_curves(board(tmp_path / "run", "loss"), step_events(tmp_path / "run"))


@needs("tensorboard")
def test_a_tracker_that_fails_is_said_once_and_changes_no_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(TensorBoard):
        def add(self, point: Any) -> None:
            raise OSError(f"no room for {point.stage}")

    plain = trainer(tmp_path / "plain")
    plain.train(**SHORT)
    followed = trainer(tmp_path / "followed", "tensorboard")
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setitem(TRACKERS, "tensorboard", Failing)
        followed.train(**SHORT)
    said = [r.getMessage() for r in caplog.records if "stopped following" in r.getMessage()]
    assert len(said) == 1
    assert "tensorboard" in said[0]
    assert "no room for block-00" in said[0]
    one, other = plain.student_model.state_dict(), followed.student_model.state_dict()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def train_apart(folder: Path, tracker: str, steps: int = 0) -> None:
    """In a process of its own: W&B starts a service; trackio reads where its database is once.

    Args:
        folder: Where the run is, and all else that a tracker writes.
        tracker: Its name.
        steps: Optimizer steps after which the process is stopped; 0 lets it finish.
    """
    code = (
        "from pathlib import Path; from tests.integration.test_trackers import *;"
        "from tests.integration.test_resume import signalling;"
        f"own = trainer(Path({str(folder)!r}), {tracker!r}, resume=True,"
        f" optimizer_cls=signalling({steps}));"
        "own.train(**SHORT)"
    )
    place = {name: str(folder / name.lower()) for name in ("HOME", "TRACKIO_DIR")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=place)
    assert ("stopped by signal 15" if steps else "") in done.stderr
    assert (done.returncode == 0) == (not steps), done.stderr


@needs("wandb")
@pytest.mark.slow
def test_wandb_keeps_a_run_offline_and_goes_on_in_it(tmp_path: Path) -> None:
    train_apart(tmp_path, "wandb", steps=6)
    train_apart(tmp_path, "wandb")
    run = tmp_path / "run"
    run_id = json.loads((run / "manifest.json").read_text())["run_id"]
    parts = sorted((run / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(parts) == 2
    assert b"block-00/loss" in parts[0].read_bytes()
    assert b"lm-head/loss" not in parts[0].read_bytes()
    assert b"lm-head/loss" in parts[1].read_bytes()


@needs("trackio")
@pytest.mark.slow
def test_trackio_has_the_curves_in_its_database(tmp_path: Path) -> None:
    train_apart(tmp_path, "trackio", steps=6)
    train_apart(tmp_path, "trackio")
    (base,) = (tmp_path / "trackio_dir").glob("*.db")
    connection = sqlite3.connect(base)
    rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    connection.close()
    assert len({name for name, _, _ in rows}) == 1
    own = step_events(tmp_path / "run")
    for stage in own:
        found = [(step, json.loads(values).get(f"{stage}/loss")) for _, step, values in rows]
        assert [each for each in found if each[1] is not None] == own[stage]


def test_a_missing_package_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "wandb" else find(name)
    )
    with pytest.raises(EnvironmentProblem, match=r"needs wandb.*\n.*\[track\]") as error:
        main(["--track", "wandb", "--output_dir", str(tmp_path / "run")])
    assert error.value.exit_code == 5
    assert not (tmp_path / "run").exists()


def test_unknown_trackers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'mlflow'.*\n.*--track tensorboard"):
        check_trackers(["tensorboard", "mlflow"])
    with pytest.raises(UsageError, match="mlflow"):
        trainer(tmp_path, "mlflow").train(**SHORT)
