"""A stage that cannot learn is found out before the run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.errors import InputError
from distillation import DistillationTrainer
from tests.builders import VANILLA_FIRST, batches, tiny_student, tiny_teacher, weights_of


def trainer_of(folder: Path, student: Any, teacher: Any = None, **options: Any) -> Any:
    return DistillationTrainer(
        teacher or tiny_teacher(),
        student,
        None,
        batches(),
        output_dir=folder / "run",
        overfit_gate=True,
        **options,
    )


@pytest.mark.parametrize("kind", VANILLA_FIRST)
def test_healthy_students_pass_and_train_as_without_it(tmp_path: Path, kind: str) -> None:
    with_gate, without = tiny_student(kind), tiny_student(kind)
    trainer_of(tmp_path / "a", with_gate).train(1, 1e-3, polish_epochs=1)
    plain = trainer_of(tmp_path / "b", without)
    plain.backbone_trainer.config.__dict__["overfit_gate"] = False
    plain.train(1, 1e-3, polish_epochs=1)
    a, b = weights_of(with_gate), weights_of(without)
    assert all(torch.equal(a[name], b[name]) for name in a)


class Deaf(torch.nn.Module):
    """A loss whose gradient never arrives."""

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (student.detach() - teacher).square().mean() + 0 * student.sum()


def test_a_stage_that_cannot_learn_stops_the_run_and_is_named(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_student())
    trainer.backbone_trainer.hidden_state_loss_fn = Deaf()
    with pytest.raises(InputError, match=r"block-00 cannot learn: .* in 40 steps\."):
        trainer.train(1, 1e-3)


def test_a_stage_is_asked_no_longer_than_until_it_has_shown_that_it_learns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trainer_of(tmp_path, tiny_student()).train(1, 1e-3)
    said = re.findall(r"loss (\S+), (\S+) after (\d+) steps?\.", caplog.text)
    assert len(said) == tiny_student().config.n_layer + 1
    assert all(float(best) < 0.9 * float(first) and 0 < int(n) < 40 for first, best, n in said)


def test_a_head_that_cannot_learn_is_named_too(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_student())
    trainer.head_trainer.logit_loss_fn = Deaf()
    with pytest.raises(InputError, match="lm-head cannot learn"):
        trainer.train(1, 1e-3)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_and_passes(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, tiny_teacher(), use_stitching_layers=False, logit_loss_temperature=1.0
    )
    trainer.train(0, 1e-3, lm_head_epochs=0)
