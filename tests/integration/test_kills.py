"""Real processes, killed at random instants: the end is that of a run nobody killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

KILLS = int(os.environ.get("CLEANGPT_KILLS", "6"))
COMMAND = (
    *(sys.executable, "-m", "examples.run_distillation_example", "--device", "cpu"),
    *("--max_samples", "12", "--student_n_embd", "24", "--student_n_head", "2", "--seed", "3"),
    *("--precision", "fp32", "--threads", "1", "--block_size", "64", "--no_token_cache"),
    *("--recipe", "best", "--lm_head_epochs", "1", "--validation_tokens", "2000"),
    *("--activation_cache", "disk", "--checkpoint_steps", "5", "--log_interval", "5"),
)


def start(folder: Path, *flags: str) -> "subprocess.Popen[bytes]":
    words = [*COMMAND, "--output_dir", str(folder), *flags]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(words, stderr=log, stdout=log)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "student_model_final_distilled.pt"
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model_state_dict"]
    return state


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_runs_end_as_straight_ones(tmp_path: Path) -> None:
    began_at = time.monotonic()
    assert start(tmp_path / "straight").wait() == 0
    whole = time.monotonic() - began_at
    chance = random.Random(0)
    kills = runs = 0
    while kills < KILLS:
        runs += 1
        folder = tmp_path / f"killed-{runs}"
        while (code := start_and_kill(folder, chance, whole)) != 0:
            kills += code is not None
        assert_as_straight(tmp_path / "straight", folder)
    assert kills >= runs  # else nothing was tried


def start_and_kill(folder: Path, chance: random.Random, whole: float) -> int | None:
    """Start or go on, and send a signal after a while; return the exit code."""
    process = start(folder, "--resume")
    number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    try:
        code = process.wait(timeout=chance.uniform(0.3, 0.8) * whole)
        assert code == 0, folder.with_suffix(".log").read_text()[-2000:]
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        code = process.wait(timeout=120)
        # Before the run has begun a signal does what it always does; after its end nothing.
        saved = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert code in (saved, -number, 0), (code, folder.with_suffix(".log").read_text()[-2000:])
    return code


def assert_as_straight(straight: Path, killed: Path) -> None:
    one, other = weights(straight), weights(killed)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    for name in ("stitching_layers.safetensors", "config.json"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes()
    logs = [(run / "metrics.jsonl").read_text() for run in (straight, killed)]
    losses = [[json.loads(line).get("loss") for line in log.splitlines()] for log in logs]
    assert losses[0] == losses[1]
    assert not (killed / "checkpoints").exists()
