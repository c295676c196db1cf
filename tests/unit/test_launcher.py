"""What a launcher says in the environment, and that only the first process writes."""

import logging
from pathlib import Path

import pytest

from cleangpt.cli import setup_logging
from cleangpt.run_directory import RunDirectory
from cleangpt.runtime.launcher import launched, on_this_machine

SECOND = {"MASTER_ADDR": "localhost", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_places() -> None:
    assert launched({}) == (0, 1)
    assert launched({"RANK": "3"}) == (0, 1)  # some schedulers set it for other reasons
    assert launched(SECOND) == (1, 4)
    assert on_this_machine(SECOND) == 2
    assert on_this_machine({"LOCAL_WORLD_SIZE": "8"}) == 1


def test_the_second_process_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECOND.items():
        monkeypatch.setenv(name, value)
    run = RunDirectory(tmp_path / "run")
    assert run.check_room(overwrite=False) == []
    with run.opened({}):
        assert run.is_open
        run.metrics.write("step", loss=1.0)
        run.add_stage({"stage": "block-00"})
        run.write_bytes("a.bin", b"x")
        run.write_folder("final", lambda folder: None)
    assert not run.is_open
    assert not (tmp_path / "run").exists()


def test_the_second_process_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECOND.items():
        monkeypatch.setenv(name, value)
    setup_logging()
    level = logging.getLogger("distillation").level
    monkeypatch.undo()
    setup_logging()
    assert level == logging.WARNING
