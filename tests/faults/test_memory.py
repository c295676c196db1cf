"""A long run takes no more memory than a short one."""

import logging
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.faults import warm_runs
from tests.faults.kill_harness import log_of, start_warm

LIMIT = 256 * 1024
"""Bytes per thousand steps. A thousand of the smallest graphs left behind would be far more."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_steps(tmp_path: Path) -> None:
    """Resident memory over the steps, epochs and checkpoints of one stage, but for its start."""
    folder = tmp_path / "run"
    training = {"epochs_per_block": [1, 900]}
    process = start_warm(warm_runs.train, folder, training=training, checkpoint_steps=100)
    run, samples = psutil.Process(process.pid), []
    while process.wait(0.25) is None:
        log = folder / "metrics.jsonl"
        if log.exists():
            steps = log.read_bytes().count(b'"event": "step"')
            samples.append((steps, run.memory_info().rss))
    assert process.end() == 0, log_of(folder)[-2000:]
    steps, sizes = np.array(samples, dtype=float).T
    late = (steps > 1100) & (steps < 3600)  # what comes then is the head
    slope = 1000 * np.polyfit(steps[late], sizes[late], 1)[0]
    # What came after the last look counts too.
    taken = (folder / "metrics.jsonl").read_bytes().count(b'"event": "step"')
    found = {"steps": taken, "bytes_per_1000_steps": int(slope), "rss": int(sizes[-1])}
    logging.getLogger(__name__).warning("%s", found)
    assert found["steps"] > 3600
    assert slope < LIMIT, found
