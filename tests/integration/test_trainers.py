"""Whole stages on tiny models: what learns, what must not move, and what must not matter."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError, UsageError
from distillation import DistillationTrainer
from distillation.head_init import untie_lm_head
from distillation.trainers import BackboneDistillationTrainer, HeadDistillationTrainer
from distillation.utils import load_checkpoint
from stitching_layers import load_stitches
from tests.builders import (
    FAMILIES,
    STUDENTS,
    backbone_trainer,
    batches,
    tiny_student,
    tiny_teacher,
    unchanged,
    weights_of,
)


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_block_learns(tmp_path: Path, kind: str) -> None:
    trainer = backbone_trainer(tmp_path, tiny_student(kind, n_layer=1), batches(1, 2))
    results = trainer.train_backbone(80, 2e-2)
    for row in results["blocks"]:
        assert row["last_loss"] < 0.5 * row["first_loss"]
        assert row["relative_error"] < 1.0
    assert results["backbone_losses"] == [row["last_loss"] for row in results["blocks"]]


@pytest.mark.slow  # test_families goes through whole runs of some
@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_teaches(tmp_path: Path, family: str) -> None:
    trainer = DistillationTrainer(
        tiny_teacher(family), tiny_student(), None, batches(2), output_dir=tmp_path / "run"
    )
    # Not from the teacher: on so few tokens the least-squares start leaves nothing to learn.
    results = trainer.train(
        6, 1e-2, lm_head_epochs=6, lm_head_lr=1e-2, initialize_head_from_teacher=False
    )
    for row in (*results["blocks"], results["head"]):
        assert row["last_loss"] < row["first_loss"]


def test_only_the_block_in_training_moves(tmp_path: Path) -> None:
    student = tiny_student(n_layer=3)
    trainer = backbone_trainer(tmp_path, student)
    snapshots = [weights_of(student)]
    train_stage = trainer.train_stage

    def watch(stage: Any, settings: Any) -> Any:
        result = train_stage(stage, settings)
        snapshots.append(weights_of(student))
        return result

    trainer.train_stage = watch
    trainer.train_backbone(1, 1e-2)
    for block in range(3):
        moved = snapshots[block].keys() - unchanged(snapshots[block], snapshots[block + 1])
        prefixes = {f"blocks.{block}."} | ({"wte.", "wpe.", "lm_head."} if block == 0 else set())
        assert moved
        assert all(name.startswith(tuple(prefixes)) for name in moved)


def test_unfrozen_blocks_go_on_learning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student = tiny_student()
    trainer = backbone_trainer(tmp_path, student, freeze_previous_blocks=False)
    before: list[Any] = []
    train_stage = trainer.train_stage

    def watch(stage: Any, settings: Any) -> Any:
        before.append(weights_of(student))
        return train_stage(stage, settings)

    trainer.train_stage = watch
    with caplog.at_level(logging.INFO):
        trainer.train_backbone(1, 1e-2)
    moved = before[1].keys() - unchanged(before[1], weights_of(student))
    assert any(name.startswith("blocks.0.") for name in moved)
    assert "wte.weight" in moved
    assert "go on learning" in caplog.text


def test_the_teacher_is_never_changed_and_both_models_stay_usable(tmp_path: Path) -> None:
    teacher, student = tiny_teacher().train(), tiny_student()
    student.wpe.weight.requires_grad_(False)
    before = weights_of(teacher)
    trainer = DistillationTrainer(teacher, student, None, batches(), output_dir=tmp_path / "run")
    trainer.train(1, 1e-2)
    assert unchanged(before, weights_of(teacher)) == before.keys()
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert not student.wpe.weight.requires_grad
    assert student.training


def test_an_interrupt_leaves_the_models_usable_and_the_run_marked(tmp_path: Path) -> None:
    teacher, student = tiny_teacher(), tiny_student()
    trainer = DistillationTrainer(teacher, student, None, batches(), output_dir=tmp_path / "run")

    def interrupt(a: Tensor, b: Tensor) -> Tensor:
        raise KeyboardInterrupt

    trainer.backbone_trainer.hidden_state_loss_fn = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train(1, 1e-2)
    assert all(p.requires_grad for p in (*teacher.parameters(), *student.parameters()))
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run" / "student_model_final_distilled.pt").exists()


def test_the_head_phase_unties_and_moves_neither_embeddings_nor_blocks(tmp_path: Path) -> None:
    student = tiny_student()
    assert student.lm_head.weight is student.wte.weight
    before = weights_of(student)
    trainer = HeadDistillationTrainer(
        tiny_teacher(), student, None, batches(), output_dir=tmp_path / "run"
    )
    trainer.train_head(2, 1e-2)
    after = weights_of(student)
    moved = before.keys() - unchanged(before, after)
    assert moved == {"lm_head.weight", "final_norm.weight", "final_norm.bias"}
    assert student.config.tie_word_embeddings is False


def head_start(tmp_path: Path, name: str, student: Any, data: Any, from_teacher: bool) -> float:
    trainer = HeadDistillationTrainer(
        tiny_teacher(),
        student,
        None,
        data,
        output_dir=tmp_path / name,
        logit_loss_temperature=1.0,
    )
    trainer.train_head(1, 1e-9, initialize_from_teacher=from_teacher)
    row = json.loads((tmp_path / name / "manifest.json").read_text())["stages"][0]
    return float(row["first_loss"])


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_head_starts_better_from_the_teacher(tmp_path: Path, kind: str) -> None:
    data = batches(1, batch_size=16)
    fitted = head_start(tmp_path, "fitted", tiny_student(kind), data, from_teacher=True)
    own = head_start(tmp_path, "own", tiny_student(kind), data, from_teacher=False)
    assert fitted < 0.8 * own


def test_the_loss_weight_acts(tmp_path: Path) -> None:
    def final(weight: float) -> tuple[float, dict[str, Tensor]]:
        student = tiny_student()
        trainer = HeadDistillationTrainer(
            tiny_teacher(),
            student,
            None,
            batches(),
            output_dir=tmp_path / str(weight),
            logit_loss_weight=weight,
            optimizer_cls=torch.optim.SGD,
        )
        loss = trainer.train_head(1, 1e-2, lm_head_max_grad_norm=1e9)["head_loss"]
        return loss, weights_of(student)

    (half, half_weights), (one, one_weights) = final(0.5), final(1.0)
    assert half == pytest.approx(0.5 * one, rel=0.05)
    assert unchanged(half_weights, one_weights) != half_weights.keys()
    assert final(0.0)[0] == 0.0


def test_a_deeper_teacher_is_mapped_and_written_down(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        tiny_teacher(), tiny_student(n_layer=2), None, batches(), output_dir=tmp_path / "run"
    )
    results = trainer.train([1, 2], [1e-2, 1e-3])
    assert [row["teacher_block"] for row in results["blocks"]] == [1, 2]
    assert [row["steps"] for row in results["blocks"]] == [4, 8]
    assert load_stitches(tmp_path / "run").layer_map == (1, 2)


def test_what_a_run_leaves_on_disk(tmp_path: Path) -> None:
    student = tiny_student("Factored")
    trainer = DistillationTrainer(
        tiny_teacher(), student, None, batches(), output_dir=tmp_path / "run"
    )
    results = trainer.train(1, 1e-2)
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} - {".lock"} == {
        "audit.json",
        "config.json",
        "final",
        "manifest.json",
        "metrics.csv",
        "metrics.jsonl",
        "stitching_layers.safetensors",
        "student_model_final_distilled.pt",
    }
    assert results["student_path"] == str(run / "student_model_final_distilled.pt")
    from_file = tiny_student("Factored", seed=5)
    untie_lm_head(BlockStack(from_file))
    load_checkpoint(results["student_path"], from_file)
    from_folder = type(student).from_pretrained(run / "final")
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        expected = student.eval()(ids).logits
        assert torch.equal(from_file.eval()(ids).logits, expected)
        assert torch.equal(from_folder.eval()(ids).logits, expected)
    config = json.loads((run / "config.json").read_text())
    assert config["lr_per_block"] == 1e-2
    with pytest.raises(UsageError, match="already holds a run"):
        trainer.train(1, 1e-2)


def test_pictures_are_written_per_block_and_epoch(tmp_path: Path) -> None:
    trainer = backbone_trainer(tmp_path, hidden_state_pictures=True)
    trainer.train_backbone(2, 1e-2)
    names = sorted(p.name for p in (tmp_path / "run" / "pictures").iterdir())
    assert names == [
        f"hidden_states_block_{block}_epoch_{epoch}.png" for block in (0, 1) for epoch in (0, 1)
    ]
    assert (tmp_path / "run" / "pictures" / names[0]).read_bytes().startswith(b"\x89PNG")


def test_custom_losses_of_two_arguments(tmp_path: Path) -> None:
    """The tutorial's extension point: a subclass that replaces the loss after construction."""

    class MyLoss(nn.Module):
        def forward(self, student_outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
            assert student_outputs.shape == teacher_outputs.shape
            assert student_outputs.ndim == 2
            return nn.functional.l1_loss(student_outputs, teacher_outputs)

    class CustomBackboneTrainer(BackboneDistillationTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.hidden_state_loss_fn = MyLoss()

    models = (tiny_teacher(), tiny_student(), None, batches())
    custom = CustomBackboneTrainer(*models, output_dir=tmp_path / "alone")
    assert len(custom.train_backbone(1, 1e-3)["backbone_losses"]) == 2
    whole = DistillationTrainer(*models, output_dir=tmp_path / "whole")
    whole.backbone_trainer = CustomBackboneTrainer(*models, output_dir=tmp_path / "whole")
    assert whole.train(1, 1e-3)["head_loss"] is not None


def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"Dimension mismatch at block 0 without stitching: Student_dim=16, Teacher_dim=32\.",
    ):
        backbone_trainer(tmp_path, use_stitching_layers=False)
    with pytest.raises(UsageError, match="teacher_n_embd=48; this teacher's width is 32"):
        backbone_trainer(tmp_path, tiny_student(teacher_n_embd=48))
    with pytest.raises(UsageError, match="it falls from 2 to 1"):
        backbone_trainer(tmp_path, tiny_student(), layer_map=[2, 1])
    with pytest.raises(InputError, match="vocabulary has 60 tokens and the teacher's 67"):
        backbone_trainer(tmp_path, tiny_student(vocab_size=60))
    with pytest.raises(UsageError, match="lr_per_block has 3 entries"):
        backbone_trainer(tmp_path).train_backbone(1, [1e-3] * 3)
    with pytest.raises(InputError, match="train_dataloader is empty"):
        backbone_trainer(tmp_path, data=[]).train_backbone(1, 1e-3)
    with pytest.raises(UsageError, match="has no length"):
        backbone_trainer(tmp_path, data=iter(batches())).train_backbone(1, 1e-3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["without a head", "backbone alone", "interrupted"])
def test_kept_states_are_freed_and_progress_starts_anew(tmp_path: Path, how: str) -> None:
    trainer = DistillationTrainer(
        tiny_teacher(), tiny_student(), None, batches(), output_dir=tmp_path / "run"
    )
    backbone = trainer.backbone_trainer
    if how == "without a head":
        trainer.train(1, 1e-3, train_lm_head=False)
    elif how == "backbone alone":
        backbone.train_backbone(1, 1e-3)
    else:
        calls = 0

        def interrupt(a: Tensor, b: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 5:
                raise KeyboardInterrupt
            return (a - b).square().mean()

        backbone.hidden_state_loss_fn = interrupt
        with pytest.raises(KeyboardInterrupt):
            trainer.train(1, 1e-3)
    assert backbone.activations.bytes_kept == 0


def test_a_perfect_student_is_not_called_diverged(tmp_path: Path) -> None:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    trainer = DistillationTrainer(
        tiny_teacher(), tiny_teacher(**no_dropout), None, batches(), output_dir=tmp_path / "run"
    )
    rows = trainer.train(1, 1e-4)["blocks"]
    assert [row["verdict"] for row in rows] == ["very close"] * 3


def test_a_run_without_training_still_leaves_valid_json(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        tiny_teacher(), tiny_student(), None, batches(), output_dir=tmp_path / "run"
    )
    results = trainer.train(0, 1e-3, lm_head_epochs=0)
    text = (tmp_path / "run" / "manifest.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["stages"][0]["verdict"] == "not trained"
    assert results["head_loss"] is None
    assert load_checkpoint(results["student_path"])["metadata"]["backbone_losses"] == [None, None]
