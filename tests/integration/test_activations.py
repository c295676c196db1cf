"""The rolling store: the same states as running the models, in any order, within its memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.builders import (
    FAMILIES,
    STUDENTS,
    VANILLA_FIRST,
    batches,
    padded,
    tiny_student,
    tiny_teacher,
    unchanged,
    weights_of,
)


def make(teacher: Any, student: Any, budget: int = 2**30) -> Any:
    from cleangpt.blocks import BlockStack
    from distillation.activations import Activations

    return Activations(BlockStack(teacher), BlockStack(student), budget)


def as_batch(raw: dict[str, Tensor]) -> Any:
    from distillation.batch import as_batch

    return as_batch(raw, torch.device("cpu"))


@pytest.mark.parametrize("name", [*FAMILIES, *STUDENTS])
def test_rolling_states_equal_a_full_pass_bit_for_bit(name: str) -> None:
    model = tiny_student(name, n_layer=3) if name in STUDENTS else tiny_teacher(name)
    kept, streamed = make(model.eval(), model.eval()), make(model, model, 0)
    data = [as_batch(raw) for raw in batches(3)]
    for block in range(3):
        for batch in data[::-1] if block % 2 else data:
            assert torch.equal(
                kept.teacher_output(block, batch), streamed.teacher_output(block, batch)
            )
            assert torch.equal(
                kept.student_input(block + 1, batch), streamed.student_input(block + 1, batch)
            )
    for batch in data:
        state = kept.student_input(3, batch)
        with torch.no_grad():
            logits = kept.student.logits_of(state, batch.input_ids)
            torch.testing.assert_close(logits, model(batch.input_ids).logits)


def test_each_block_runs_once_per_window_and_heads_only_when_asked() -> None:
    teacher, student = tiny_teacher(), tiny_student(n_layer=3).eval()
    activations = make(teacher, student)
    calls = {"teacher": 0, "student": 0, "head": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for block in teacher.transformer.h:
        block.mlp.register_forward_hook(count("teacher"))
    for block in student.blocks:
        next(block.children()).register_forward_hook(count("student"))
    teacher.lm_head.register_forward_hook(count("head"))
    data = [as_batch(raw) for raw in batches(4)]
    for block in range(3):
        for _epoch in range(3):
            for batch in data:
                activations.teacher_output(block, batch)
                activations.student_input(block + 1, batch)
    # One call more looks, once and at two tokens, whether a block returns a tuple.
    assert calls == {"teacher": 4 * 3 + 1, "student": 4 * 3 + 1, "head": 0}


def test_windows_are_found_in_any_order_and_under_any_padding() -> None:
    teacher = tiny_teacher()
    activations = make(teacher, teacher)
    ids = torch.cat([raw["input_ids"] for raw in batches(4)])
    for start in range(0, 16, 4):
        activations.teacher_output(0, as_batch({"input_ids": ids[start : start + 4]}))
    bytes_kept = activations.bytes_kept
    mixed = {"input_ids": ids[torch.randperm(16)[:4]]}
    expected = make(teacher, teacher, 0).teacher_output(1, as_batch(mixed))
    torch.testing.assert_close(activations.teacher_output(1, as_batch(mixed)), expected)
    for side in ("left", "right"):
        batch = as_batch(padded({**mixed, "attention_mask": torch.ones(4, 12)}, 5, side))
        states = batch.valid(activations.teacher_output(1, batch))
        torch.testing.assert_close(states, expected.reshape(-1, expected.shape[-1]))
    assert activations.bytes_kept == bytes_kept


def test_levels_side_by_side_are_computed_for_unknown_windows_alone() -> None:
    from distillation.passing_states import PassingStates

    teacher = tiny_teacher()
    passing = PassingStates(make(teacher, teacher), [0, 2])
    streamed = make(teacher, teacher, 0)
    rows = [0]

    def count(module: Any, inputs: Any, output: Any) -> None:
        rows[0] += len(inputs[0])

    ids = torch.cat([raw["input_ids"] for raw in batches(2)])
    hook = teacher.transformer.h[0].mlp.register_forward_hook(count)
    for own, computed in ([0, 1, 2, 3], 4), ([6, 2, 5, 0], 6), ([5, 1, 3, 2], 6):
        batch = as_batch({"input_ids": ids[own]})
        found = [passing.teacher_output(block, batch) for block in (0, 2)]
        assert rows[0] == computed
        hook.remove()
        for block, state in zip((0, 2), found, strict=True):
            torch.testing.assert_close(state, streamed.teacher_output(block, batch))
        hook = teacher.transformer.h[0].mlp.register_forward_hook(count)


def test_what_looks_at_all_levels_gets_a_large_batch_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cleangpt.blocks import BlockStack
    from distillation.audit import audit_teacher

    teacher = BlockStack(tiny_teacher())
    raw = batches(1, batch_size=7)[0]
    batch = as_batch({**raw, "attention_mask": torch.arange(84).reshape(7, 12) % 5})
    whole = audit_teacher(teacher, [batch])
    monkeypatch.setattr("distillation.batch.MEASURED_AT_ONCE", 30)
    seen: list[int] = []
    teacher.model.transformer.h[0].mlp.register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    parts = audit_teacher(teacher, [batch])
    assert seen == [2, 2, 2, 1]
    assert parts.tokens == whole.tokens
    for own, other in zip(parts.levels, whole.levels, strict=True):
        assert own.rms == pytest.approx(other.rms)
        assert own.token_norms == pytest.approx(other.token_norms)
        torch.testing.assert_close(own.floors, other.floors)
    seen.clear()
    monkeypatch.setattr("distillation.batch.MEASURED_AT_ONCE", 5)  # a window is never cut
    assert audit_teacher(teacher, [batch], max_tokens=20).tokens < whole.tokens
    assert set(seen) == {1}


def test_memory_stays_in_its_budget_and_states_stay_right() -> None:
    teacher = tiny_teacher()
    row = 12 * 32 * 4
    activations, streamed = make(teacher, teacher, 6 * row), make(teacher, teacher, 0)
    data = [as_batch(raw) for raw in batches(4)]
    for block in range(3):
        for batch in data:
            torch.testing.assert_close(
                activations.teacher_output(block, batch), streamed.teacher_output(block, batch)
            )
            assert activations.bytes_kept <= 6 * row
    assert activations.bytes_kept == 6 * row
    activations.forget()
    assert activations.bytes_kept == 0


@pytest.mark.parametrize("kind", VANILLA_FIRST)
def test_a_whole_run_has_the_same_bits_with_and_without_the_store(
    tmp_path: Path, kind: str
) -> None:
    from distillation import DistillationTrainer

    def run(cache: str) -> tuple[dict[str, Tensor], Any]:
        student = tiny_student(kind)
        trainer = DistillationTrainer(
            tiny_teacher(),
            student,
            None,
            batches(),
            output_dir=tmp_path / cache,
            activation_cache=cache,
        )
        results = trainer.train(2, 1e-2, lm_head_epochs=2, lm_head_lr=1e-2)
        return weights_of(student), (results["backbone_losses"], results["head_loss"])

    (kept, kept_losses), (streamed, streamed_losses) = run("auto"), run("off")
    assert kept_losses == streamed_losses
    assert unchanged(kept, streamed) == kept.keys()


def test_a_shuffling_loader_gives_the_same_losses(tmp_path: Path) -> None:
    from distillation import DistillationTrainer

    ids = list(torch.cat([raw["input_ids"] for raw in batches(5)]))

    def run(cache: str) -> list[float]:
        loader = DataLoader(ids, batch_size=4, shuffle=True)  # type: ignore[arg-type]
        trainer = DistillationTrainer(
            tiny_teacher(),
            tiny_student(),
            None,
            loader,
            output_dir=tmp_path / cache,
            activation_cache=cache,
        )
        losses: list[float] = trainer.train(2, 1e-2)["backbone_losses"]
        return losses

    assert run("ram") == pytest.approx(run("off"), rel=1e-6)


def test_unfrozen_runs_keep_the_teacher_side_only(tmp_path: Path) -> None:
    from distillation import DistillationTrainer

    def run(cache: str) -> list[float]:
        trainer = DistillationTrainer(
            tiny_teacher(),
            tiny_student(),
            None,
            batches(),
            output_dir=tmp_path / cache,
            freeze_previous_blocks=False,
            activation_cache=cache,
        )
        losses: list[float] = trainer.train(2, 1e-2)["backbone_losses"]
        return losses

    assert run("ram") == run("off")


def test_training_again_does_not_read_old_states(tmp_path: Path) -> None:
    from tests.builders import backbone_trainer

    trainer = backbone_trainer(tmp_path / "a", overwrite=True)
    trainer.train_backbone(1, 1e-2)
    again = trainer.train_backbone(1, 1e-2)["backbone_losses"]
    other = backbone_trainer(tmp_path / "b", overwrite=True, activation_cache="off")
    other.train_backbone(1, 1e-2)
    assert other.train_backbone(1, 1e-2)["backbone_losses"] == again
