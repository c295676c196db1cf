"""A student that is its teacher has nothing to learn, and stays it whatever the rates."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distillation import DistillationTrainer
from tests.builders import batches, tiny_teacher

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def self_trainer(place: Path, **options: Any) -> DistillationTrainer:
    """Of a teacher and a copy of it; without stitches its states are compared as the teacher's."""
    return DistillationTrainer(
        tiny_teacher(),
        tiny_teacher(**NO_DROPOUT),
        None,
        batches(),
        output_dir=place / "run",
        use_stitching_layers=False,
        **options,
    )


def test_a_student_that_is_the_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    """P10: student := teacher gives zero block losses and zero divergence."""
    trainer = self_trainer(tmp_path)
    results = trainer.train(1, 1e-12, wd_per_block=0.0, lm_head_lr=1e-12, lm_head_wd=0.0)
    assert max(results["backbone_losses"]) < 1e-12
    assert results["head_loss"] < 1e-8
    assert all(row["relative_error"] < 1e-8 for row in results["blocks"])


@pytest.mark.parametrize("loss", ["mse", "nmse", "smooth_l1", "whiten", "cosine"])
def test_validation_keeps_it_the_teacher_at_any_rate(tmp_path: Path, loss: str) -> None:
    """Adam makes whole steps of a gradient of rounding errors; the start is kept as the best."""
    trainer = self_trainer(
        tmp_path,
        distill_loss_type=loss,
        validation_dataloader=batches(1),
        polish_hidden_weight=1.0,
        early_stop_patience=1,
    )
    results = trainer.train(
        2, 1e-2, lm_head_epochs=1, lm_head_lr=1e-2, polish_epochs=1, polish_lr=1e-2
    )
    assert results["blocks"][0]["first_loss"] < 1e-6
    ids = torch.arange(12)[None]
    with torch.no_grad():
        own = trainer.student_model.eval()(ids).logits
        wanted = tiny_teacher().eval()(ids).logits
    assert torch.allclose(own, wanted, atol=1e-5)
