"""Students wider than their teacher: they start as nearly the teacher, and use their room."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.blocks import BlockStack
from distillation import DistillationTrainer
from distillation.evaluation import evaluate
from distillation.shared_basis import find_basis
from distillation.teacher_init import init_from_teacher
from tests.builders import BLOCKS, STUDENTS, WIDTH, batches, tiny_student, tiny_teacher
from tests.evaluation_samples import PROSE, byte_tokenizer, fast_settings, student, teacher
from tests.integration.test_family_init import like
from tests.integration.test_teacher_weights import noisy_teacher

WIDER = 48
IDS = batches(1, seed=9)[0]["input_ids"]


def started(own_teacher: Any, own_student: Any) -> None:
    basis = find_basis("pca", torch.eye(WIDTH), WIDER)
    stacks = BlockStack(own_teacher), BlockStack(own_student)
    init_from_teacher(*stacks, range(BLOCKS), "pca", basis)


@torch.no_grad()
def states(model: Any) -> Tensor:
    return torch.stack(BlockStack(model.eval()).block_hidden_states(IDS))


def test_a_wider_student_starts_as_nearly_the_teacher_and_learns_in_all_channels() -> None:
    own_teacher = noisy_teacher("gpt2")
    own = tiny_student(n_layer=BLOCKS, n_embd=WIDER, n_head=4, bias=True)
    other = states(own)[..., :WIDTH]
    with torch.no_grad():
        own.wte.weight.mul_(0.1)  # so that the further channels hold little
        own.wpe.weight.mul_(0.1)
    started(own_teacher, own)
    wanted = states(own_teacher)
    assert (states(own)[..., :WIDTH] - wanted).norm() < 0.15 * wanted.norm()
    assert (other - wanted).norm() > 0.9 * wanted.norm()
    own.train()(input_ids=IDS, labels=IDS).loss.backward()
    up = own.blocks[0].mlp.up.weight.grad
    assert up[:, WIDTH:].abs().max() > 0
    assert own.wte.weight[:, WIDTH:].abs().min() > 0


def test_a_wider_student_of_the_teachers_family_is_nearly_the_teacher() -> None:
    """RMS norms divide by a little more, for what the further channels hold."""
    own_teacher = noisy_teacher("llama")
    own = like(own_teacher, hidden_size=WIDER, num_attention_heads=6, num_key_value_heads=3)
    assert BlockStack(own).hidden_size == WIDER
    started(own_teacher, own)
    wanted = states(own_teacher)
    assert (states(own)[0, ..., :WIDTH] - wanted[0]).abs().max() < 1e-5
    own = like(own_teacher, hidden_size=WIDER, head_dim=8)
    started(own_teacher, own)
    assert (states(own)[..., :WIDTH] - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_wider_student_is_distilled_and_evaluated(kind: str, tmp_path: Path) -> None:
    own = student(kind, n_embd=WIDER, n_layer=2)
    trainer = DistillationTrainer(
        teacher(), own, byte_tokenizer(), batches(), output_dir=tmp_path / "run",
        init_from_teacher="pca", stitch_start="least_squares", distill_loss_type="nmse",
    )  # fmt: skip
    results = trainer.train(1, 1e-3, lm_head_epochs=1, polish_epochs=1)
    assert len(results["blocks"]) == 2
    assert results["polish_loss"] < 1
    found = evaluate(
        own, teacher(), byte_tokenizer(), PROSE, settings=fast_settings(),
        stitches=trainer.backbone_trainer.stitches,
    )  # fmt: skip
    assert found["hidden_states"]["stitch"] == "saved"
    assert tiny_teacher().config.n_embd < own.config.n_embd
