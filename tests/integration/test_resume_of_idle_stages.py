"""Runs with stages that train nothing go on after a stop: those stages have no losses to tell."""

from pathlib import Path
from typing import Any

import pytest

from cleangpt.checkpoints import Checkpoint, Checkpoints
from tests.integration.test_resume import BEST, TRAINING, assert_same, run


@pytest.mark.parametrize(
    "idle",
    [{"lm_head_epochs": 0}, pytest.param({"epochs_per_block": [0, 2]}, marks=pytest.mark.slow)],
)
def test_a_stop_in_the_polish_changes_no_bit(idle: dict[str, Any], tmp_path: Path) -> None:
    training = {**TRAINING, **idle}
    steps = 4 * (2 * 2 + 2 + 2) - 8
    straight = run(tmp_path / "straight", [], training, **BEST)
    resumed = run(tmp_path / "resumed", [steps - 2], training, **BEST)
    assert_same(straight, resumed, tmp_path / "straight", tmp_path / "resumed")


def test_numbers_that_json_has_not_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    values = {"losses": [1.5, float("inf"), -float("inf")], "last": {"loss": float("nan")}}
    Checkpoints(tmp_path, "ab" * 16).save(Checkpoint(1, {}, values))
    found = Checkpoints(tmp_path, "ab" * 16).newest()
    assert found is not None
    assert str(found.state) == str(values)
    assert "NaN" not in next(tmp_path.glob("*/state.json")).read_text()
