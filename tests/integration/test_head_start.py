"""How the head starts: copied, fitted, and at the teacher's own scale."""

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.builders import batches, tiny_student, tiny_teacher, unchanged, weights_of

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def divergence(teacher: Any, student: Any) -> float:
    """KL(teacher || student) in nats per position."""
    ids = batches(2, batch_size=16)[0]["input_ids"]
    with torch.no_grad():
        teacher_log = teacher(ids).logits.log_softmax(-1)
        student_log = student.eval()(ids).logits.log_softmax(-1)
    return float((teacher_log.exp() * (teacher_log - student_log)).sum(-1).mean())


def head_after_start(
    tmp_path: Path, teacher: Any, student: Any, *, stitched: bool, **options: Any
) -> float:
    """KL(teacher || student) in nats right after the head's start."""
    from distillation.trainers import HeadDistillationTrainer

    data = batches(2, batch_size=16)
    trainer = HeadDistillationTrainer(
        teacher, student, None, data, output_dir=tmp_path / "run", **options
    )
    trainer.stitched = stitched
    trainer.train_head(0, 1e-3)
    return divergence(teacher, student)


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
    assert right < 0.5 * divergence(teacher, student)


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


def anisotropic_features(width: int = 12) -> torch.Tensor:
    """Features whose directions differ a hundredfold in size, with a mean."""
    torch.manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(width, width))[0] * torch.logspace(0, -2, width)
    return (torch.randn(500, width) + 0.5) @ mixing.T


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_low_rank_head_is_the_nearest_in_the_metric_of_the_features(rank: int) -> None:
    from distillation.head_init import best_factors

    features = anisotropic_features().double()
    weight = torch.randn(40, 12).double()
    down, up = best_factors(weight, features.T @ features / len(features), rank)
    assert (down.shape, up.shape) == ((rank, 12), (40, rank))
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    truncated = u[:, :rank] * s[:rank] @ vt[:rank]

    def error(other: torch.Tensor) -> float:
        return float((features @ (weight - other).T).square().mean())

    assert error(up @ down) < 0.8 * error(truncated)
    # Nothing of this rank is better: least squares cannot improve either factor.
    seen = features @ down.T
    better = torch.linalg.lstsq(seen, features @ weight.T).solution.T
    assert error(up @ down) == pytest.approx(error(better @ down), rel=1e-4)


def test_a_head_of_full_rank_in_two_factors_is_the_full_head(tmp_path: Path) -> None:
    full, factored = tiny_student("SASP"), tiny_student("SASP", head_rank=16)
    backbone = {k: v for k, v in full.state_dict().items() if not k.startswith("lm_head")}
    factored.load_state_dict(backbone, strict=False)
    for index, student in enumerate((full, factored)):
        head_after_start(tmp_path / str(index), tiny_teacher(), student, stitched=True)
    ids = batches(1)[0]["input_ids"]
    torch.testing.assert_close(factored(ids).logits, full(ids).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(factored.lm_head.weight, full.lm_head.weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"head_rank": 8}, {"final_norm": "folded"}], ids=str)
def test_every_kind_of_head_starts_near_the_teachers_logits(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain, other = tiny_student(n_embd=32), tiny_student(n_embd=32, **changes)
    backbone = {k: v for k, v in plain.state_dict().items() if not k.startswith(("lm_", "final"))}
    other.load_state_dict(backbone, strict=False)
    before = divergence(tiny_teacher(), other)
    best = head_after_start(tmp_path / "a", tiny_teacher(), plain, stitched=True)
    found = head_after_start(tmp_path / "b", tiny_teacher(), other, stitched=True)
    assert best < 0.6 * before
    assert found < best + 0.3 * (before - best)


def test_a_tied_head_finds_the_teachers_norm_and_keeps_its_embeddings(tmp_path: Path) -> None:
    student = tiny_teacher(**NO_DROPOUT)
    torch.manual_seed(0)
    with torch.no_grad():
        student.transformer.ln_f.weight.copy_(1.0 + torch.rand(32))
        student.transformer.ln_f.bias.normal_()
    assert divergence(tiny_teacher(), student) > 0.1
    before = weights_of(student)
    kl = head_after_start(tmp_path, tiny_teacher(), student, stitched=False, head_tying="tie")
    assert kl < 1e-3
    moved = before.keys() - unchanged(before, student.state_dict())
    assert moved == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert student.lm_head.weight is student.transformer.wte.weight
    assert student.config.tie_word_embeddings


class Unread(list[Any]):
    """Data that nobody may read."""

    def __iter__(self) -> NoReturn:
        raise AssertionError("the data were read")


def test_nothing_is_read_where_a_tied_head_has_no_norm_to_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from distillation.trainers import HeadDistillationTrainer

    teacher, student = tiny_teacher(), tiny_teacher("llama", seed=1, tie_word_embeddings=True)
    before, data = weights_of(student), Unread(batches())
    trainer = HeadDistillationTrainer(
        teacher, student, None, data, output_dir=tmp_path, head_tying="tie"
    )
    trainer.train_head(0, 1e-3)
    assert "a LlamaRMSNorm, starts as it is" in caplog.text
    assert unchanged(before, student.state_dict()) == before.keys()


def test_a_tied_head_trains_its_norm_only(tmp_path: Path) -> None:
    from distillation.trainers import HeadDistillationTrainer

    student = tiny_student("Factored")
    before, untouched = weights_of(student), divergence(tiny_teacher(), student)
    trainer = HeadDistillationTrainer(
        tiny_teacher(), student, None, batches(), output_dir=tmp_path, head_tying="tie"
    )
    row = trainer.train_head(6, 1e-2)["head"]
    assert row["last_loss"] < row["first_loss"]
    assert divergence(tiny_teacher(), student) < untouched
    moved = before.keys() - unchanged(before, student.state_dict())
    assert moved == {"final_norm.weight", "final_norm.bias"}
    assert student.lm_head.weight is student.wte.weight


def test_a_tied_head_is_no_choice_for_a_student_that_has_its_own(tmp_path: Path) -> None:
    from cleangpt.errors import UsageError
    from distillation.trainers import HeadDistillationTrainer

    trainer = HeadDistillationTrainer(
        tiny_teacher(),
        tiny_student(head_rank=4),
        None,
        batches(),
        output_dir=tmp_path / "run",
        head_tying="tie",
    )
    with pytest.raises(UsageError, match=r"weights of its own\.\nChoose head_tying='untie'"):
        trainer.train_head(1, 1e-3)
    assert not (tmp_path / "run").exists()
