"""Blocks under ``torch.compile``: nearly the same losses, and nothing left behind."""

import shutil
from pathlib import Path

import pytest
import torch

from cleangpt.runtime.compiling import compiled
from distillation.losses.divergence import DivergenceKernel, _TemperedKL
from tests.builders import backbone_trainer, tiny_student

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler"),
    pytest.mark.filterwarnings("ignore"),  # the compiler's own
]


def test_a_compiled_run_has_nearly_the_same_losses(tmp_path: Path) -> None:
    losses = {}
    for name, compile_blocks in (("eager", False), ("compiled", True)):
        student = tiny_student()
        trainer = backbone_trainer(tmp_path / name, student, compile_blocks=compile_blocks)
        losses[name] = trainer.train_backbone(2, 1e-2)["backbone_losses"]
        assert not any("forward" in block.__dict__ for block in student.blocks)
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)


def test_the_compiled_divergence_is_the_same() -> None:
    student, teacher = torch.randn(2, 6, 501)
    results = []
    kernel = DivergenceKernel()
    with compiled([kernel]):
        assert kernel.is_compiled
        for used in (None, kernel):
            scores = student.clone().requires_grad_()
            loss = _TemperedKL.apply(scores, teacher, 2.0, used)
            loss.backward()
            assert scores.grad is not None
            results.append((loss.detach(), scores.grad.clone()))
    assert "forward" not in kernel.__dict__
    assert not kernel.is_compiled
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-8)
