"""How the head starts: copied, fitted, and at the teacher's own scale."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import batches, tiny_student, tiny_teacher

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def head_after_start(tmp_path: Path, teacher: Any, student: Any, *, stitched: bool) -> float:
    """KL(teacher || student) in nats right after the head's start."""
    from distillation.trainers import HeadDistillationTrainer

    data = batches(2, batch_size=16)
    trainer = HeadDistillationTrainer(
        teacher, student, None, data, output_dir=tmp_path / "run", logit_loss_temperature=1.0
    )
    trainer.stitched = stitched
    trainer.train_head(0, 1e-3)
    with torch.no_grad():
        teacher_log = teacher(data[0]["input_ids"]).logits.log_softmax(-1)
        student_log = student.eval()(data[0]["input_ids"]).logits.log_softmax(-1)
    return float((teacher_log.exp() * (teacher_log - student_log)).sum(-1).mean())


@pytest.mark.parametrize("stitched", [True, False])
def test_a_student_with_the_teachers_states_gets_its_head(tmp_path: Path, stitched: bool) -> None:
    student = tiny_teacher(**NO_DROPOUT)
    with torch.no_grad():
        student.lm_head.weight = torch.nn.Parameter(torch.randn_like(student.lm_head.weight))
    assert head_after_start(tmp_path, tiny_teacher(), student, stitched=stitched) < 1e-3


def test_alone_the_head_trainer_fits_and_never_copies() -> None:
    """Equal widths do not mean equal states: the backbone may have been taught through a stitch."""
    from distillation.trainers import HeadDistillationTrainer

    trainer = HeadDistillationTrainer(tiny_teacher(), tiny_student(n_embd=32), None, batches())
    assert trainer.stitched is True


@pytest.mark.parametrize(
    ("family", "changes"),
    [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.0625})],
)
def test_a_teacher_that_scales_its_logits_is_fitted_at_its_scale(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    from tests.builders import LLAMA_LIKE

    teacher = tiny_teacher(family, config_fields={**LLAMA_LIKE, **changes})
    student = tiny_student(n_embd=32)
    # Random students: far from zero, but near what a head at the right scale can reach.
    right = head_after_start(tmp_path / "a", teacher, student, stitched=True)
    with torch.no_grad():
        student.lm_head.weight.mul_(8.0)
        ids = batches(2, batch_size=16)[0]["input_ids"]
        teacher_log = teacher(ids).logits.log_softmax(-1)
        wrong_log = student(ids).logits.log_softmax(-1)
    wrong = float((teacher_log.exp() * (teacher_log - wrong_log)).sum(-1).mean())
    assert right < 0.5 * wrong


def test_a_head_with_a_bias_is_not_copied_without_it() -> None:
    from cleangpt.blocks import BlockStack
    from distillation.head_init import can_copy_head
    from tests.builders import LLAMA_LIKE

    phi = BlockStack(tiny_teacher("phi", config_fields=LLAMA_LIKE))
    student = BlockStack(tiny_student(n_embd=32))
    assert phi.lm_head.bias is not None
    assert not can_copy_head(phi, student, stitched=False)
    gpt2 = BlockStack(tiny_teacher())
    assert can_copy_head(gpt2, student, stitched=False)
    assert not can_copy_head(gpt2, student, stitched=True)
