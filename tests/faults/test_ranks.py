"""Runs of two processes, killed: the end is bit for bit that of a run of two that nobody killed."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.kill_harness import (
    Running,
    descendants,
    differences,
    different_checkpoints,
    log_of,
    newest_checkpoint,
    start_command,
    wait_for_a_step,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STOP = 85
FLAGS = (
    *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    *("-m", "examples.run_distillation_example", "--device", "cpu", "--threads", "1"),
    *("--max_samples", "6", "--student_n_embd", "24", "--student_n_head", "2"),
    *("--precision", "fp32", "--block_size", "64", "--batch_size", "5", "--no_token_cache"),
    *("--epochs_per_block", "1", "--polish_epochs", "2", "--recipe", "best"),
    *("--validation_tokens", "300", "--no_overfit_gate", "--student_dropout", "0.1"),
    *("--activation_cache", "disk", "--checkpoint_steps", "5", "--log_interval", "1", "--resume"),
)


def start(folder: Path, faults: str = "") -> Running:
    return start_command([*FLAGS, "--output_dir", str(folder)], folder.with_suffix(".log"), faults)


def finish(folder: Path) -> None:
    assert start(folder).end() == 0, log_of(folder)[-3000:]


def stop_at(folder: Path) -> Path:
    """Run on to step ``STOP`` and return a copy of the checkpoint there."""
    assert start(folder, f"step.taken:{STOP}:SIGTERM").end() != 0
    newest = newest_checkpoint(folder)
    assert json.loads((newest / "state.json").read_text())["steps"] == STOP
    return Path(shutil.copytree(newest, folder.with_name(f"{folder.name}-stopped")))


def training(folder: Path) -> Running:
    """A run that has taken a step."""
    before = log_of(folder)
    process = start(folder)
    wait_for_a_step(folder, before)
    return process


def test_two_processes_that_are_killed_end_as_two_that_are_not(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    stopped = stop_at(straight)
    finish(straight)
    assert start(killed, "step.taken:33:SIGKILL").end() != 0
    process = training(killed)
    process.signal(signal.SIGTERM, group=True)
    assert process.end() != 0
    assert json.loads((killed / "manifest.json").read_text())["status"] == "stopped"
    process = training(killed)
    Running(descendants(process.pid)[-1], process.wait).signal(signal.SIGKILL)
    assert process.end() != 0
    process = training(killed)
    process.signal(signal.SIGINT)
    assert process.end() != 0
    assert json.loads((killed / "manifest.json").read_text())["status"] == "stopped"
    assert different_checkpoints(stopped, stop_at(killed)) == []
    finish(killed)
    assert differences(straight, killed) == []
