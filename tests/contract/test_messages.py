"""The two messages that the tutorial prints appear, word for word, where it says they do."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.contract.local_hub import STORIES, save_tiny_gpt2

CONTRACT = json.loads(Path(__file__).with_name("contract.json").read_text(encoding="utf-8"))
DIMENSION_MISMATCH, SKIPPED_BATCH = CONTRACT["messages"]


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Any]:
    """A teacher of width 48, a student of width 24, and what a trainer needs besides."""
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, GPT2LMHeadModel

    from config_distillation import GPTConfig
    from examples.run_distillation_example import DistillationDataCollator, TextDataset
    from model.model_vanilla_distillation import VanillaTransformerModelDistillation

    save_tiny_gpt2(tmp_path / "gpt2", blocks=2)
    teacher = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    config = GPTConfig(
        vocab_size=teacher.config.vocab_size, n_layer=2, n_embd=24, n_head=2, block_size=32
    )
    return {
        "teacher_model": teacher,
        "student_model": VanillaTransformerModelDistillation(config),
        "tokenizer": tokenizer,
        "train_dataloader": DataLoader(
            TextDataset(STORIES[:2], tokenizer, block_size=32),
            batch_size=4,
            collate_fn=DistillationDataCollator(tokenizer, block_size=32),
        ),
        "output_dir": str(tmp_path / "out"),
    }


def test_dimension_mismatch_without_stitching(parts: dict[str, Any]) -> None:
    from distillation.trainers import BackboneDistillationTrainer

    promised = DIMENSION_MISMATCH.format(block_idx=0, student_dim=24, teacher_dim=48)
    with pytest.raises(ValueError, match=re.escape(promised)) as caught:
        BackboneDistillationTrainer(**parts, use_stitching_layers=False).train_backbone(1, 1e-3)
    assert "use_stitching_layers" in str(caught.value), "and the way out"


def test_non_finite_loss_skips_the_batch(
    parts: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from cleangpt.errors import NonFiniteError
    from distillation.trainers import BackboneDistillationTrainer

    student = parts["student_model"]
    before = {key: value.clone() for key, value in student.state_dict().items()}
    trainer = BackboneDistillationTrainer(**parts)
    trainer.hidden_state_loss_fn = lambda student, teacher: (student - teacher).mean() * torch.nan
    with caplog.at_level("WARNING"), contextlib.suppress(NonFiniteError):
        trainer.train_backbone(1, 1e-3)
    assert SKIPPED_BATCH.format(loss="nan") in caplog.text
    after = student.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "no step was taken"
