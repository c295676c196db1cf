"""Blocks under ``torch.compile``: nearly the same losses, and nothing left behind."""

import shutil
from pathlib import Path

import pytest

from tests.builders import backbone_trainer, tiny_student


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_run_has_nearly_the_same_losses(tmp_path: Path) -> None:
    losses = {}
    for name, compile_blocks in (("eager", False), ("compiled", True)):
        student = tiny_student()
        trainer = backbone_trainer(tmp_path / name, student, compile_blocks=compile_blocks)
        losses[name] = trainer.train_backbone(2, 1e-2)["backbone_losses"]
        assert not any("forward" in block.__dict__ for block in student.blocks)
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)
