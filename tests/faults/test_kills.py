"""Real processes, killed at random and at chosen instants: the end is that of a run nobody killed.

The processes are forked from one that has imported everything. ``soak.py`` does the same to whole
commands, to data-parallel runs and to loaders' workers, for as long as wanted.
"""

import json
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cleangpt.runtime.faultpoints import FAULT_POINTS
from tests.faults import warm_runs
from tests.faults.kill_harness import (
    SIGNALS,
    Running,
    descendants,
    differences,
    different_checkpoints,
    expected_codes,
    log_of,
    newest_checkpoint,
    start_warm,
    wait_for_a_step,
)

KILLS = 3
STOP = 22
"""A step in the polish, in the middle of an epoch: optimizer states are compared there."""


@dataclass(frozen=True)
class Straight:
    """A run nobody killed, but stopped once by itself."""

    folder: Path
    stopped: Path
    seconds: float


def start(folder: Path, faults: str = "", **options: Any) -> Running:
    return start_warm(warm_runs.train, folder, faults, **options)


def finish(folder: Path, **options: Any) -> None:
    assert start(folder, **options).end() == 0, log_of(folder)[-2000:]


def stop_at(folder: Path, step: int) -> Path:
    """Run up to a step, and return a copy of the checkpoint there."""
    assert start(folder, f"step.taken:{step}:SIGTERM").end() == 143, log_of(folder)[-2000:]
    return copy_of_newest(folder)


def copy_of_newest(folder: Path) -> Path:
    return Path(shutil.copytree(newest_checkpoint(folder), folder.with_name("stopped")))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight") / "run"
    stopped = stop_at(folder, STOP)
    began_at = time.monotonic()
    finish(folder)
    seconds = (time.monotonic() - began_at) * warm_runs.STEPS / (warm_runs.STEPS - STOP)
    return Straight(folder, stopped, seconds)


def kill_at_random(folder: Path, chance: random.Random, seconds: float) -> int:
    """Start or go on, and send a signal after a while; without one the run stops at ``STOP``."""
    process = start(folder, f"step.taken:{STOP}:SIGTERM")
    number = chance.choice(SIGNALS)
    code = process.wait(chance.uniform(0.05, 0.6) * seconds)
    if code is None:
        process.signal(number)
        code = process.end()
    assert code in (*expected_codes(number), 143), (code, log_of(folder)[-2000:])
    return code


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_runs_killed_at_random_end_as_straight_ones(
    seed: int, straight: Straight, tmp_path: Path
) -> None:
    folder, chance = tmp_path / "run", random.Random(seed)
    kills, stopped = 0, None
    while kills < KILLS and stopped is None:
        kills += kill_at_random(folder, chance, straight.seconds) != 143
        if (folder / "checkpoints").exists() and steps_saved(folder) == STOP:
            stopped = copy_of_newest(folder)
    assert different_checkpoints(straight.stopped, stopped or stop_at(folder, STOP)) == []
    finish(folder)
    assert differences(straight.folder, folder) == []


FAULTS = (
    *("store.computed:3", "checkpoint.tensors_written:2", "checkpoint.before_rename:1"),
    *("checkpoint.renamed:1", "stage.finished:1", "student.folder_written:1"),
)
"""One after the other, each in a process that goes on from what the one before has left."""


def test_runs_killed_inside_saves_and_hand_overs_end_as_straight_ones(
    straight: Straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for fault in FAULTS:
        assert start(folder, f"{fault}:SIGKILL").end() == -signal.SIGKILL, fault
    finish(folder)
    assert differences(straight.folder, folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", [p for p in FAULT_POINTS if p not in ("step.taken", "file.deleted")]
)
def test_a_kill_at_any_fault_point_changes_no_bit(
    point: str, straight: Straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    codes = [start(folder, f"{point}:{number}:SIGKILL").end() for number in (1, 2, 3, 1)]
    assert codes[0] == -signal.SIGKILL
    assert set(codes) <= {-signal.SIGKILL, 0}  # few points are passed three times
    finish(folder)
    assert differences(straight.folder, folder) == []


EPOCH = warm_runs.STEPS_PER_EPOCH
PLACES = {
    "the first step": 1,
    "the last of an epoch": EPOCH,
    "the first of an epoch": EPOCH + 1,
    "before the last of a block": 2 * EPOCH - 1,
    "the last of a block": 2 * EPOCH,
    "the first of a block": 2 * EPOCH + 1,
    "the last of all blocks": 4 * EPOCH,
    "the first of the polish": 5 * EPOCH + 1,
    "the last": warm_runs.STEPS,
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_steps", [0, 1, 3])
@pytest.mark.parametrize("step", PLACES.values(), ids=PLACES)
def test_a_kill_at_any_kind_of_step_changes_no_bit(
    step: int, checkpoint_steps: int, straight: Straight, tmp_path: Path
) -> None:
    folder, options = tmp_path / "run", {"checkpoint_steps": checkpoint_steps}
    assert start(folder, f"step.taken:{step}:SIGKILL", **options).end() == -signal.SIGKILL
    if checkpoint_steps == 1 and step > 1:
        assert steps_saved(folder) == step - 1
    finish(folder, **options)
    ended = "block-00 was finished before the run stopped" in log_of(folder)
    assert ended == (checkpoint_steps > 0 and step > 2 * EPOCH)  # and it is not done again
    assert differences(straight.folder, folder) == []


def test_a_signal_during_a_save_lets_it_complete(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert start(folder, "checkpoint.tensors_written:2:SIGTERM").end() == 143
    assert steps_saved(folder) == 6
    assert list(folder.rglob("*.tmp")) == []


def test_a_second_ctrl_c_ends_at_once_and_leaves_the_last_checkpoint(
    straight: Straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert start(folder, "step.taken:5:SIGINT").end() == 130
    assert steps_saved(folder) == 5
    # The first asks at step 7, the second comes in the middle of the save it has asked for.
    faults = "step.taken:7:SIGINT,checkpoint.tensors_written:2:SIGINT"
    assert start(folder, faults).end() == 130
    assert steps_saved(folder) == 6
    assert list(folder.rglob("*.tmp")) == []
    finish(folder)
    assert differences(straight.folder, folder) == []


def training_with_a_worker(folder: Path) -> tuple[Running, int]:
    """A run that has taken steps, and the process that loads its data."""
    before = log_of(folder)
    process = start(folder, num_workers=1)
    wait_for_a_step(folder, before)
    (worker,) = descendants(process.pid)
    return process, worker


@pytest.mark.slow
def test_signals_to_workers_and_process_groups(straight: Straight, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process, worker = training_with_a_worker(folder)
    process.signal(signal.SIGTERM, group=True)
    assert process.end() == 143
    assert "everything until there is saved" in log_of(folder)
    process, worker = training_with_a_worker(folder)
    Running(worker, process.wait).signal(signal.SIGKILL)
    assert process.end() == 5
    assert "error: a process that prepares batches has died: DataLoader worker" in log_of(folder)
    assert "lower --num_workers" in log_of(folder)
    # The worker outlives its killed run by some seconds, and must not hold its directory.
    process, worker = training_with_a_worker(folder)
    process.signal(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL
    finish(folder, num_workers=1)
    assert differences(straight.folder, folder) == []


@pytest.mark.slow
def test_an_overwrite_that_is_killed_leaves_no_half_run(straight: Straight, tmp_path: Path) -> None:
    for number, options in ((1, {}), (3, {}), (6, {"overwrite": True, "resume": False})):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(straight.folder, folder)
        words = {"overwrite": True, "resume": False}
        assert start(folder, f"file.deleted:{number}:SIGKILL", **words).end() == -signal.SIGKILL
        assert start(folder, resume=False).end() == 2  # neither asked for
        finish(folder, **options)
        assert "nothing is left to do" not in log_of(folder)
        assert differences(straight.folder, folder) == []


def steps_saved(folder: Path) -> int:
    """The optimizer steps in the newest checkpoint."""
    state = json.loads((newest_checkpoint(folder) / "state.json").read_text())
    return int(state["steps"])
