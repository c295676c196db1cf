"""The teacher's final norm and head, folded with a stitching layer into the student's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders import LLAMA_LIKE, batches, tiny_student, tiny_teacher, unchanged, weights_of


def odd_teacher(family: str) -> Any:
    """A teacher whose final norm has a gain and, where it can, a bias of no special value."""
    from cleangpt.blocks import BlockStack

    fields = {"cohere": {**LLAMA_LIKE, "logit_scale": 0.25}, "phi": LLAMA_LIKE}
    teacher = tiny_teacher(family, config_fields=fields.get(family))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in BlockStack(teacher).final_norm.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        if BlockStack(teacher).lm_head.bias is not None:
            BlockStack(teacher).lm_head.bias.normal_()
    return teacher


def random_stitch(student_dim: int, *, bias: bool = True) -> Any:
    from stitching_layers import StitchingLayer

    torch.manual_seed(4)
    stitch = StitchingLayer(student_dim, 32, bias)
    nn.init.normal_(stitch.projection.weight)
    if bias:
        nn.init.normal_(stitch.projection.bias, std=2.0)
    return stitch


def both_logits(stitch: Any, teacher: Any, student: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's logits, and the teacher's after the stitched state."""
    from cleangpt.blocks import BlockStack

    ids = batches(1)[0]["input_ids"]
    own, theirs = BlockStack(student.eval()), BlockStack(teacher)
    with torch.no_grad():
        state = own.hidden(own.state_entering(own.num_blocks, ids))
        return student(ids).logits, theirs.logits_of(stitch(state), ids)


def fold(stitch: Any, teacher: Any, student: Any) -> None:
    from cleangpt.blocks import BlockStack
    from distillation.head_fold import fold_head

    fold_head(stitch, BlockStack(teacher), BlockStack(student))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "phi", "cohere"])
def test_the_folded_student_is_the_teacher_behind_the_stitch(family: str, bias: bool) -> None:
    teacher = odd_teacher(family)
    student = tiny_student(final_norm="folded")
    stitch = random_stitch(16, bias=bias)
    fold(stitch, teacher, student)
    found, expected = both_logits(stitch, teacher, student)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [8, 32, 48])
@pytest.mark.parametrize("kind", ["Factored", "SASP"])
def test_students_of_every_kind_and_width_are_folded(kind: str, width: int) -> None:
    teacher = odd_teacher("gpt2")
    student = tiny_student(kind, n_embd=width, final_norm="folded")
    stitch = random_stitch(width)
    fold(stitch, teacher, student)
    found, expected = both_logits(stitch, teacher, student)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_a_constant_massive_channel_of_the_teacher_is_folded_too() -> None:
    teacher, student = odd_teacher("gpt2"), tiny_student(final_norm="folded")
    stitch = random_stitch(16)
    with torch.no_grad():
        stitch.projection.bias[7] = 3000.0
        teacher.transformer.ln_f.weight[7] = 0.01
        teacher.transformer.ln_f.weight.mul_(100)
    fold(stitch, teacher, student)
    found, expected = both_logits(stitch, teacher, student)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_the_norms_epsilon_is_the_teachers() -> None:
    """Near zero the epsilon decides: there the student's own, 1e-5, would be seen."""
    teacher = tiny_teacher("llama", rms_norm_eps=1e-3)
    student, stitch = tiny_student(final_norm="folded"), random_stitch(16)
    with torch.no_grad():
        stitch.projection.weight.mul_(0.01)
        stitch.projection.bias.mul_(0.01)
    fold(stitch, teacher, student)
    found, expected = both_logits(stitch, teacher, student)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_fold_touches_the_norm_and_the_head_only() -> None:
    student = tiny_student(final_norm="folded")
    before = weights_of(student)
    fold(random_stitch(16), odd_teacher("gpt2"), student)
    moved = before.keys() - unchanged(before, student.state_dict())
    assert moved == {"final_norm.weight", "lm_head.weight", "lm_head.bias"}


def test_a_folded_student_survives_saving_and_generates(tmp_path: Path) -> None:
    from distillation.utils.checkpoint import load_checkpoint, save_checkpoint
    from model import build_student

    student = tiny_student(final_norm="folded")
    fold(random_stitch(16), odd_teacher("gpt2"), student)
    ids = batches(1)[0]["input_ids"]
    student.eval().save_pretrained(tmp_path / "folder")
    loaded = type(student).from_pretrained(tmp_path / "folder")
    path = save_checkpoint(student, tmp_path / "student.pt")
    stored = load_checkpoint(path)["config"]
    again = build_student(type(student.config).from_dict(stored)).eval()
    load_checkpoint(path, again)
    for other in (loaded, again):
        assert torch.equal(other(ids).logits, student(ids).logits)
    tokens = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **tokens), student.generate(ids, **tokens))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "this one has a LayerNorm"),
        ({"final_norm": "folded", "head_rank": 4}, "the student's head is of low rank"),
    ],
)
def test_a_student_that_cannot_hold_it_is_refused(fields: dict[str, Any], message: str) -> None:
    from cleangpt.errors import UsageError

    with pytest.raises(UsageError, match=message):
        fold(random_stitch(16), tiny_teacher(), tiny_student(**fields))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.Softmax(dim=-1), nn.GroupNorm(4, 32)], ids=str)
def test_what_is_no_norm_of_all_channels_is_refused(norm: nn.Module) -> None:
    from cleangpt.errors import UsageError
    from distillation.head_fold import norm_form

    with pytest.raises(UsageError, match="neither a LayerNorm nor an RMS norm"):
        norm_form(norm, 32)


def test_a_norms_parts_are_found_by_running_it() -> None:
    from distillation.head_fold import norm_form

    torch.manual_seed(0)
    norm = nn.LayerNorm(9, eps=3e-4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    form = norm_form(norm, 9)
    assert form.centres
    assert form.epsilon == pytest.approx(3e-4, rel=1e-6)
    torch.testing.assert_close(form.gain.float(), norm.weight.detach())
    torch.testing.assert_close(form.bias.float(), norm.bias.detach())
    form = norm_form(nn.RMSNorm(9, eps=1e-6), 9)
    assert not form.centres
    assert form.epsilon == pytest.approx(1e-6, rel=1e-4)


def head_trainer(tmp_path: Path, student: Any, **options: Any) -> Any:
    from distillation.trainers import HeadDistillationTrainer

    return HeadDistillationTrainer(
        odd_teacher("gpt2"), student, None, batches(), output_dir=tmp_path / "run", **options
    )


def test_the_head_phase_starts_from_the_fold(tmp_path: Path) -> None:
    student, stitch = tiny_student(final_norm="folded"), random_stitch(16)
    trainer = head_trainer(tmp_path, student, head_start="fold")
    trainer.last_stitch = stitch
    assert trainer.train_head(0, 1e-3)["head"]["steps"] == 0
    found, expected = both_logits(stitch, trainer.teacher_model, student)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_folded_head_goes_on_learning(tmp_path: Path) -> None:
    student = tiny_student(final_norm="folded")
    trainer = head_trainer(tmp_path, student, head_start="fold")
    trainer.last_stitch = random_stitch(16)
    row = trainer.train_head(6, 1e-2)["head"]
    assert row["last_loss"] < 0.8 * row["first_loss"]
    assert student.final_norm.weight.grad is None


def test_folding_is_refused_without_the_norm_and_without_a_stitch(tmp_path: Path) -> None:
    from cleangpt.errors import UsageError

    with pytest.raises(UsageError, match=r"final_norm='folded'"):
        head_trainer(tmp_path, tiny_student(), head_start="fold").train_head(0, 1e-3)
    assert not (tmp_path / "run").exists(), "refused before the run starts"
    student = tiny_student(final_norm="folded")
    with pytest.raises(UsageError, match="this run has none"):
        head_trainer(tmp_path, student, head_start="fold").train_head(0, 1e-3)
