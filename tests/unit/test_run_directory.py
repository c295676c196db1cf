import json
import os
import stat
from pathlib import Path

import pytest

from cleangpt.errors import EnvironmentProblem, UsageError
from cleangpt.manifest import FORMAT_VERSION
from cleangpt.metrics_log import MetricsLog
from cleangpt.run_directory import RunDirectory, write_atomically


def manifest_of(path: Path) -> dict[str, object]:
    manifest: dict[str, object] = json.loads((path / "manifest.json").read_text())
    return manifest


def test_a_run_is_marked_done_or_failed(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "good").opened({"seed": 1}) as run:
        run.add_stage({"stage": "block-00"})
        assert manifest_of(run.path)["status"] == "running"
    good = manifest_of(tmp_path / "good")
    assert (good["status"], good["seed"]) == ("done", 1)
    assert good["stages"] == [{"stage": "block-00"}]
    with pytest.raises(RuntimeError), RunDirectory(tmp_path / "bad").opened({}):
        raise RuntimeError("broken")
    assert manifest_of(tmp_path / "bad")["status"] == "failed"
    assert manifest_of(tmp_path / "bad")["reason"] == "RuntimeError: broken"


def test_an_earlier_run_is_only_replaced_on_request(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with RunDirectory(tmp_path).opened({}):
        pass
    with (
        pytest.raises(UsageError, match=r"already holds a run \(manifest\.json\)") as error,
        RunDirectory(tmp_path).opened({}),
    ):
        pass
    assert "--overwrite" in error.value.remedy
    with RunDirectory(tmp_path).opened({}, overwrite=True):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_of_no_run_of_ours_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_text("mine")
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with (
        pytest.raises(UsageError, match=r"holds manifest.json, pictures, but no manifest of a run"),
        RunDirectory(tmp_path).opened({}, overwrite=True),
    ):
        pass
    assert (tmp_path / "pictures" / "cat.png").read_text() == "mine"


def test_room_is_checked_without_writing(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "new" / "run").check_room(overwrite=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="is not a writable directory"):
        RunDirectory(tmp_path / "file" / "run").check_room(overwrite=False)


def test_opening_twice_joins_the_open_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.opened({"seed": 1}), run.opened({"seed": 2}):
        pass
    assert manifest_of(tmp_path)["seed"] == 1


def test_two_runs_cannot_share_a_directory(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path).opened({}),
        pytest.raises(EnvironmentProblem, match=f"Another run holds .*pid {os.getpid()}"),
        RunDirectory(tmp_path).opened({}, overwrite=True),
    ):
        pass


def test_a_file_in_the_way_is_explained(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with (
        pytest.raises(EnvironmentProblem, match=r"Cannot write .*taken"),
        RunDirectory(tmp_path / "taken").opened({}),
    ):
        pass


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.pt"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentProblem, match=r"No space left .* bytes free"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        run.write_folder("final", fail)
    assert list(tmp_path.iterdir()) == []


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = RunDirectory(tmp_path).write_bytes("a.bin", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_metrics_write_null_for_what_json_cannot_hold(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("step", loss=float("nan"), step=3, tokens_per_second=2.0)
    record = json.loads(log.path.read_text())
    assert record == {
        "event": "step",
        "loss": None,
        "step": 3,
        "tokens_per_second": 2.0,
        "nonfinite": ["loss"],
    }


def test_metrics_that_changed_while_a_run_was_stopped_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("step", loss=1.5)
    size, checksum = log.size(), log.checksum(log.size())
    log.write("step", loss=1.25)
    log.go_on(size, checksum)
    assert caplog.text == ""
    assert log.size() == size
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "loss": 9.5}\n')
    log.go_on(size, checksum)
    assert "cannot be trusted" in caplog.text


@pytest.mark.parametrize("version", [FORMAT_VERSION, FORMAT_VERSION - 1])
def test_an_overwrite_that_is_cut_off_is_done_by_the_next_start(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunDirectory(tmp_path).opened({}) as run:
        run.write_json("config.json", {})
        run.write_json("audit.json", {})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": version}))

    def cut_off(name: str) -> None:
        if name == "file.deleted":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cleangpt.run_directory.faultpoint", cut_off)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory(tmp_path).opened({}, overwrite=True).__enter__()
    left = {"manifest.json", "config.json", "audit.json"} & {p.name for p in tmp_path.iterdir()}
    assert len(left) == 2
    with pytest.raises(UsageError, match="already holds a run"):
        RunDirectory(tmp_path).opened({}).__enter__()
    with RunDirectory(tmp_path).opened({}, resume=True) as run:
        assert run.run_id != manifest["run_id"]
        assert not (tmp_path / "config.json").exists()
