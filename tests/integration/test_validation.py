"""Held-out data while training: losses are written down, the best weights kept, and a stage that no
longer gains stops."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.errors import UsageError
from tests.builders import backbone_trainer, batches, tiny_student, unchanged, weights_of

HELD_OUT = batches(2, seed=77)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def overfitting(folder: Path, student: Any, **options: Any) -> Any:
    """Two windows of training data: held-out loss falls first and rises later."""
    return backbone_trainer(
        folder,
        student,
        batches(1, batch_size=2),
        validation_dataloader=HELD_OUT,
        lr_schedule="constant",
        **options,
    )


def test_validation_changes_no_training_step(tmp_path: Path) -> None:
    plain, validated = tiny_student(dropout=0.1), tiny_student(dropout=0.1)
    a = backbone_trainer(tmp_path / "a", plain)
    b = backbone_trainer(tmp_path / "b", validated, validation_dataloader=HELD_OUT)
    losses = [t.train_backbone(2, 1e-3)["backbone_losses"] for t in (a, b)]
    assert losses[0] == losses[1]
    # Both still gain in every epoch, so the best weights are the last ones.
    assert unchanged(weights_of(plain), weights_of(validated)) == set(weights_of(plain))


def test_the_weights_with_the_lowest_held_out_loss_are_kept(tmp_path: Path) -> None:
    student = tiny_student(n_layer=1)
    trainer = overfitting(tmp_path, student)
    (row,) = trainer.train_backbone(60, 3e-2)["blocks"]
    losses = row["validation_losses"]
    assert len(losses) == 1 + 60  # the start's is the first
    assert losses[-1] > min(losses)  # it did overfit
    assert row["kept_epochs"] == losses.index(min(losses))
    written = events(tmp_path, "validation")
    assert [event["loss"] for event in written] == losses

    stage = trainer.stages(trainer.activations)[0]
    from distillation.batch import as_batch

    student.eval()
    with torch.no_grad():
        held = [as_batch(batch, torch.device("cpu")) for batch in HELD_OUT]
        mean = sum(float(stage.loss(batch)) for batch in held) / len(held)
    assert mean == pytest.approx(min(losses), rel=1e-5)


def test_a_block_that_no_longer_gains_stops(tmp_path: Path) -> None:
    trainer = overfitting(tmp_path, tiny_student(n_layer=1), early_stop_patience=3)
    (row,) = trainer.train_backbone(60, 3e-2)["blocks"]
    losses = row["validation_losses"]
    assert len(losses) < 1 + 60
    assert len(losses) == row["kept_epochs"] + 1 + 3
    assert row["steps"] == len(losses) - 1


def test_parallel_blocks_stop_one_by_one(tmp_path: Path) -> None:
    trainer = overfitting(
        tmp_path, tiny_student(n_layer=2), early_stop_patience=2, schedule="parallel_local"
    )
    rows = trainer.train_backbone([60, 5], 3e-2)["blocks"]
    assert len(rows[0]["validation_losses"]) > len(rows[1]["validation_losses"])


def test_patience_without_held_out_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="validation_dataloader"):
        backbone_trainer(tmp_path, early_stop_patience=2)


def test_a_stage_that_only_gets_worse_keeps_its_start(tmp_path: Path) -> None:
    student = tiny_student(n_layer=1)
    before = weights_of(student)
    trainer = backbone_trainer(
        tmp_path, student, batches(3), validation_dataloader=HELD_OUT, lr_schedule="constant"
    )
    (row,) = trainer.train_backbone(2, 2.0)["blocks"]
    assert row["kept_epochs"] == 0
    assert row["steps"] == 6
    assert unchanged(before, weights_of(student)) == set(before)
