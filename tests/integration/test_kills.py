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


def start(folder: Path, *flags: str) -> "subprocess.Popen[str]":
    words = [*COMMAND, "--output_dir", str(folder), *flags]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "student_model_final_distilled.pt"
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model_state_dict"]
    return state


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_runs_end_as_straight_ones(tmp_path: Path) -> None:
    straight = start(tmp_path / "straight")
    began_at = time.monotonic()
    assert straight.wait() == 0
    whole = time.monotonic() - began_at
    chance = random.Random(0)
    codes = []
    for kill in range(KILLS):
        process = start(tmp_path / "killed", "--resume")
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        try:
            codes.append(process.wait(timeout=chance.uniform(0.3, 0.9) * whole))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            codes.append(process.wait(timeout=120))
            expected = {signal.SIGKILL: -9, signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}
            found = expected[number]
            assert codes[-1] in (found if isinstance(found, tuple) else (found,)), (kill, number)
    last = start(tmp_path / "killed", "--resume")
    assert last.wait() == 0, last.stderr.read() if last.stderr else ""
    (tmp_path / "codes.txt").write_text(" ".join(map(str, codes)))
    one, other = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    for name in ("stitching_layers.safetensors", "config.json"):
        files = [tmp_path / run / name for run in ("straight", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("straight", "killed")]
    losses = [[json.loads(line).get("loss") for line in log.splitlines()] for log in logs]
    assert losses[0] == losses[1]
    leftovers = [p.name for p in (tmp_path / "killed").rglob("*.tmp")]
    assert leftovers == []
    assert not (tmp_path / "killed" / "checkpoints").exists()
