"""Disk and files (D01 to D19 of docs/faults.md): full, gone, damaged, hostile or another's."""

import json
import os
import pickle
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cleangpt.checkpoints import Checkpoint, Checkpoints
from cleangpt.errors import CheckpointError, EnvironmentProblem
from cleangpt.manifest import FORMAT_VERSION, check_same_run
from cleangpt.run_directory import RunDirectory
from distillation.disk_needs import DiskNeeds, check_disk_room, disk_needs
from distillation.utils import save_checkpoint
from tests.builders import tiny_student
from tests.faults.small_runs import (
    TRAINING,
    equal_weights,
    file_size_limit,
    newest_checkpoint,
    small_trainer,
)

RUN_ID = "ab" * 16


def saved(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, RUN_ID)
    for step in steps:
        checkpoints.save(checkpoint(step))
    return checkpoints


def checkpoint(step: int, state: str = "") -> Checkpoint:
    return Checkpoint(step, {"w": torch.arange(2000.0), "b": torch.ones(3)}, {"where": state})


# A full disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["", "x" * 20_000])
def test_a_full_disk_keeps_the_checkpoint_before(state: str, tmp_path: Path) -> None:
    """The tensors do not fit, or they do and what is written after them does not."""
    checkpoints = saved(tmp_path / "c", 1)
    kept = list((tmp_path / "c").iterdir())
    with (
        file_size_limit(12_000 if state else 4_000),
        pytest.raises(
            EnvironmentProblem, match=r"\(8,012 bytes needed, [\d,]+ bytes free\)"
        ) as error,
    ):
        checkpoints.save(checkpoint(2, state))
    assert error.value.exit_code == 5
    assert "ulimit -f" in error.value.remedy
    assert list((tmp_path / "c").iterdir()) == kept
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 1


@pytest.mark.slow
def test_a_disk_that_fills_up_in_mid_run_ends_it_and_it_goes_on_later(tmp_path: Path) -> None:
    straight = small_trainer(tmp_path / "straight")
    straight.train(**TRAINING)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    with file_size_limit(2**40):  # puts back what `fill` changes
        own = small_trainer(tmp_path / "full", fill, 6, checkpoint_steps=3)
        with pytest.raises(EnvironmentProblem, match="bytes needed"):
            own.train(**TRAINING)
    found = newest_checkpoint(tmp_path / "full")
    assert found is not None
    assert found.state["steps"] == 4
    assert not list((tmp_path / "full" / "run").rglob("*.tmp"))
    again = small_trainer(tmp_path / "full")
    again.train(**TRAINING)
    assert equal_weights(straight.student_model, again.student_model)


def test_a_full_disk_keeps_the_student_file_that_was_there(tmp_path: Path) -> None:
    path = save_checkpoint(nn.Linear(2, 2), tmp_path / "a.pt")
    before = path.read_bytes()
    with file_size_limit(3_000), pytest.raises(EnvironmentProblem, match=r"bytes needed, .* free"):
        save_checkpoint(nn.Linear(100, 100), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_half_of_a_folder(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with file_size_limit(3_000), pytest.raises(EnvironmentProblem, match="limit on the size"):
        run.write_folder("final", tiny_student().save_pretrained)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_will_be_too_small_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillation.disk_needs.free_disk", lambda path: 100_000)
    with pytest.raises(
        EnvironmentProblem, match=r"needs about \d+ kB .* and 100 kB are free"
    ) as error:
        small_trainer(tmp_path).train(**TRAINING)
    assert error.value.exit_code == 5
    assert not (tmp_path / "run").exists()
    with pytest.raises(EnvironmentProblem, match="50 kB student, 1 MB frozen states") as error:
        check_disk_room(tmp_path, DiskNeeds(50_000, 50_000, 10**6))
    assert "--activation_cache ram" in error.value.remedy
    check_disk_room(tmp_path, DiskNeeds(50_000, 50_000, 0))
    (tmp_path / "old").write_bytes(bytes(1000))
    check_disk_room(tmp_path, DiskNeeds(50_000, 51_000, 0), overwrite=True)
    with pytest.raises(EnvironmentProblem):
        check_disk_room(tmp_path, DiskNeeds(50_000, 51_000, 0))


@pytest.mark.slow
def test_the_estimate_of_the_disk_is_near_what_a_run_writes(tmp_path: Path) -> None:
    def used() -> int:
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files)

    own = small_trainer(tmp_path, checkpoint_steps=5)
    seen: list[int] = []
    save = Checkpoints.save

    class Watched(Checkpoints):
        def save(self, checkpoint: Checkpoint) -> Path:
            path = save(self, checkpoint)
            seen.append(used() + sum(t.nbytes for t in checkpoint.tensors.values()))
            return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distillation.distillation_trainer.Checkpoints", Watched)
        own.train(**TRAINING)
    backbone = own.backbone_trainer
    needs = disk_needs(backbone.teacher, backbone.student, trains_all=True, states=0)
    assert 0.4 * needs.total < max(seen) < needs.total
    run = tmp_path / "run"
    names = ("student_model_final_distilled.pt", "final/model.safetensors")
    left = sum((run / name).stat().st_size for name in names)
    assert 0.5 * needs.student < left < 1.5 * needs.student


# Places -------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_told_before_a_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher here could not be read: that it is not said shows that nobody tried."""
    from cleangpt.cli import run_command
    from examples.run_distillation_example import main

    (tmp_path / "file").write_text("in the way")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("damaged")
    where = ["--output_dir", str(tmp_path / "file" / "run")]
    assert (
        run_command(main, ["--teacher_model_name_or_path", str(tmp_path / "teacher"), *where]) == 5
    )
    assert "is not a writable directory" in capsys.readouterr().err


def test_a_run_whose_directory_is_deleted_ends_in_two_lines(tmp_path: Path) -> None:
    own = small_trainer(tmp_path, lambda: shutil.rmtree(tmp_path / "run"), 3)
    with pytest.raises(EnvironmentProblem, match=r"metrics\.jsonl: No such file") as error:
        own.train(**TRAINING)
    assert error.value.exit_code == 5


@pytest.mark.parametrize(
    "name", ["with spaces", "\u00fc\u0444\u6f22", "link", "a/b/../c", "x" * 255]
)
def test_names_of_every_kind_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    with RunDirectory(name).opened({}) as run:
        saved(run.path / "checkpoints", 1)
    assert (tmp_path / name / "manifest.json").is_file()
    assert saved(tmp_path / name / "checkpoints").newest() is not None


def test_a_name_that_is_too_long_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(EnvironmentProblem, match="File name too long"),
        RunDirectory(tmp_path / ("x" * 256)).opened({}),
    ):
        pass


def test_files_of_a_private_umask_are_private(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = Checkpoints(tmp_path, RUN_ID).save(checkpoint(1))
        path = save_checkpoint(nn.Linear(1, 1), tmp_path / "a.pt")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (*folder.iterdir(), path)} == {0o600}


def test_the_systems_folder_for_temporary_files_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert saved(tmp_path / "c", 1).newest() is not None
    save_checkpoint(nn.Linear(1, 1), tmp_path / "a.pt")
    RunDirectory(tmp_path).write_folder("final", tiny_student().save_pretrained)


HOLD = """
import sys, time
from cleangpt.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).opened({}):
    print("held", flush=True)
    time.sleep(100)
"""


def test_the_lock_names_the_process_that_holds_it_and_is_free_when_that_is_killed(
    tmp_path: Path,
) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        holder = f"pid {child.pid} on {socket.gethostname()}"
        with (
            pytest.raises(EnvironmentProblem, match=holder) as error,
            RunDirectory(tmp_path / "run").opened({}, overwrite=True),
        ):
            pass
        assert error.value.exit_code == 5
        child.send_signal(signal.SIGKILL)
    with RunDirectory(tmp_path / "run").opened({}, overwrite=True):
        pass


# Damaged checkpoints ------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Path], object]] = {
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "header only": lambda file: file.write_bytes(file.read_bytes()[:8]),
    "one bit": lambda file: file.write_bytes(flipped(file.read_bytes())),
    "missing": lambda file: file.unlink(),
}


def flipped(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "MANIFEST.json"])
def test_a_damaged_file_means_the_checkpoint_before(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    newest, older = (tmp_path / f"step-{n:08d}-{RUN_ID[:8]}" for n in (2, 1))
    DAMAGES[damage](newest / name)
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 1
    assert f"Checkpoint {newest} is not used: " in caplog.text
    DAMAGES[damage](older / name)
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be used") as error:
        checkpoints.newest()
    assert error.value.exit_code == 4


def test_what_is_no_checkpoint_is_ignored_and_stays(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    own = f"step-00000009-{RUN_ID[:8]}"
    foreign = ["step-abc", "step-9999999999", f"step-9999999999-{RUN_ID[:8]}", "notes", own]
    for name in foreign:
        (tmp_path / name).mkdir()
    (tmp_path / f"step-00000008-{RUN_ID[:8]}").write_text("a file")
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 1
    assert checkpoints.last_number() == 9  # an empty one of ours keeps its number
    checkpoints.save(checkpoint(10))
    checkpoints.save(checkpoint(11))
    assert {*foreign[:-1]} < {path.name for path in tmp_path.iterdir()}


def test_a_number_of_another_run_is_neither_used_nor_deleted(tmp_path: Path) -> None:
    other = Checkpoints(tmp_path, "cd" * 16)
    stale = other.save(checkpoint(1000))
    found = saved(tmp_path, 1, 2, 3, 4).newest()
    assert found is not None
    assert found.step == 4
    assert stale.is_dir()


@pytest.mark.parametrize(
    "change",
    [{"teacher": {"fingerprint": "b"}}, {"student": {"class": "B"}}, {"seed": 2}, {"data": "b"}],
    ids=str,
)
def test_a_run_of_something_else_is_refused_by_name(change: dict[str, Any]) -> None:
    about = {"teacher": {"fingerprint": "a"}, "student": {"class": "A"}, "seed": 1, "data": "a"}
    with pytest.raises(CheckpointError, match=f"has another {next(iter(change))}") as error:
        check_same_run(about, {**about, **change}, Path("run"))
    assert error.value.exit_code == 4


def test_a_run_of_a_newer_version_is_refused_and_another_version_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunDirectory(tmp_path).opened({"seed": 1}):
        pass
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    check_same_run({**manifest, "library_version": "0.0.1"}, {"seed": 1}, tmp_path)
    assert "library_version was 0.0.1" in caplog.text
    path.write_text(json.dumps({**manifest, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(CheckpointError, match=r"format version 3; this library reads 2\.\nUse the"):
        RunDirectory(tmp_path).manifest()


class Canary:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickles_beside_a_checkpoint_are_never_read(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "c", 1)
    folder = next((tmp_path / "c").iterdir())
    for name in ("optimizer.pt", "rng_state.pth", ".metadata", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert checkpoints.newest() is not None
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"/annex/objects/SHA256E-s1", b"version https://git-lfs.x"])
def test_a_pointer_in_place_of_weights_is_named(content: bytes, tmp_path: Path) -> None:
    from distillation.evaluation.loading import load_model

    student = tiny_student()
    student.save_pretrained(tmp_path / "final")
    save_checkpoint(student, tmp_path / "a.pt")
    for path in (tmp_path / "a.pt", tmp_path / "final" / "model.safetensors"):
        path.write_bytes(content)
    for name in ("a.pt", "final"):
        with pytest.raises(CheckpointError, match="pointer"):
            load_model(str(tmp_path / name))
