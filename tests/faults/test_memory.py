"""A long run takes no more memory than a short one."""

import logging
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.faults import warm_runs
from tests.faults.kill_harness import log_of, start_warm

LIMIT = 512 * 1024
"""Bytes per thousand steps. Of 1000 steps each with one tensor of 64 floats left behind it would be
too much by half."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_steps(tmp_path: Path) -> None:
    """Resident memory over steps, checkpoints, epochs and blocks, the first third left out."""
    folder = tmp_path / "run"
    training = {"epochs_per_block": 300, "lm_head_epochs": 100, "polish_epochs": 100}
    process = start_warm(warm_runs.train, folder, training=training, checkpoint_steps=100)
    run, samples = psutil.Process(process.pid), []
    while process.wait(0.25) is None:
        log = folder / "metrics.jsonl"
        if log.exists():
            steps = log.read_bytes().count(b'"event": "step"')
            samples.append((steps, run.memory_info().rss))
    assert process.end() == 0, log_of(folder)[-2000:]
    steps, sizes = np.array(samples, dtype=float).T
    late = steps > steps.max() / 3
    slope = 1000 * np.polyfit(steps[late], sizes[late], 1)[0]
    found = {"steps": int(steps.max()), "bytes_per_1000_steps": int(slope), "rss": int(sizes[-1])}
    logging.getLogger(__name__).warning("%s", found)
    assert found["steps"] > 2000
    assert slope < LIMIT, found
