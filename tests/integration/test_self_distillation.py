"""A student that is the teacher stays it, whatever the rates: no stage ends worse than it began."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distillation import DistillationTrainer
from tests.builders import batches, tiny_teacher

STANDARDISING = ("nmse", "smooth_l1", "whiten", "cosine")


@pytest.mark.parametrize("loss", ["mse", *STANDARDISING])
def test_a_student_in_the_teachers_shape_stays_the_teacher(tmp_path: Path, loss: str) -> None:
    """Adam makes whole steps of a gradient of rounding errors; validation knows the start.

    Without stitches the student's states are compared as the teacher's own, raw ones.
    """
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    teacher, student = tiny_teacher(), tiny_teacher(**plain)
    options: dict[str, Any] = {"polish_hidden_weight": 1.0, "early_stop_patience": 1}
    trainer = DistillationTrainer(
        teacher,
        student,
        None,
        batches(),
        output_dir=tmp_path / "run",
        distill_loss_type=loss,
        use_stitching_layers=False,
        validation_dataloader=batches(1),
        **options,
    )
    results = trainer.train(
        2, 1e-2, lm_head_epochs=1, lm_head_lr=1e-2, polish_epochs=1, polish_lr=1e-2
    )
    assert results["blocks"][0]["first_loss"] < 1e-6
    ids = torch.arange(12)[None]
    with torch.no_grad():
        own, wanted = student(ids).logits, teacher(ids).logits
    assert torch.allclose(own, wanted, atol=1e-5)
