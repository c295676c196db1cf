"""All blocks in one pass: no gradient between blocks, the same losses and options."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.errors import UsageError
from tests.builders import STUDENTS, backbone_trainer, batches, tiny_student, unchanged, weights_of

MEASURED = len(batches())
"""Passes at the end, for the errors of the chain."""


def train(
    place: Path, schedule: str, epochs: Any = 2, kind: str = "Vanilla", blocks: int = 3, **more: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    student = tiny_student(kind, n_layer=blocks)
    trainer = backbone_trainer(place / schedule, student, schedule=schedule, **more)
    rows = trainer.train_backbone(epochs, 1e-2)["blocks"]
    return weights_of(student), rows


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.parametrize("kind", STUDENTS)
def test_with_one_block_it_is_the_sequential_schedule_bit_for_bit(
    tmp_path: Path, kind: str
) -> None:
    one, rows = train(tmp_path, "sequential", kind=kind, blocks=1)
    other, others = train(tmp_path, "parallel_local", kind=kind, blocks=1)
    assert unchanged(one, other) == one.keys()
    assert [timeless(row) for row in rows] == [timeless(row) for row in others]


@pytest.mark.parametrize("kind", STUDENTS)
def test_no_gradient_crosses_a_block(tmp_path: Path, kind: str) -> None:
    before = weights_of(tiny_student(kind, n_layer=3))
    sequential, rows = train(tmp_path, "sequential", kind=kind)
    together, others = train(tmp_path, "parallel_local", kind=kind)
    same = unchanged(sequential, together)
    first = {name for name in sequential if name.startswith(("wte", "wpe", "blocks.0."))}
    assert first <= same
    assert timeless(rows[0]) == timeless(others[0])
    assert all(row["last_loss"] < row["first_loss"] for row in others)
    for block in ("blocks.1.", "blocks.2."):
        assert any(name.startswith(block) and name not in same for name in together)
    assert {"final_norm.weight", "final_norm.bias"} <= unchanged(before, together)


def test_the_teacher_runs_once_per_batch(tmp_path: Path) -> None:
    trainer = backbone_trainer(
        tmp_path, tiny_student(n_layer=3), schedule="parallel_local", audit_tokens=0
    )
    calls = {"first": 0, "last": 0, "head": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    blocks = trainer.teacher_model.transformer.h
    blocks[0].mlp.register_forward_hook(count("first"))
    blocks[-1].mlp.register_forward_hook(count("last"))
    trainer.teacher_model.lm_head.register_forward_hook(count("head"))
    trainer.train_backbone(1, 1e-2)
    once = len(batches()) + MEASURED
    assert calls == {"first": once, "last": once, "head": 0}


def test_a_block_stops_after_its_own_epochs(tmp_path: Path) -> None:
    short, _ = train(tmp_path / "a", "parallel_local", [1, 1, 1], lr_schedule="constant")
    long, rows = train(tmp_path / "b", "parallel_local", [1, 3, 0], lr_schedule="constant")
    start = weights_of(tiny_student(n_layer=3))
    assert [row["steps"] for row in rows] == [4, 12, 0]
    assert rows[2]["verdict"] == "not trained"
    assert all(torch.equal(short[n], long[n]) for n in short if n.startswith(("wte", "blocks.0.")))
    assert all(torch.equal(start[n], long[n]) for n in start if n.startswith("blocks.2."))
    assert any(not torch.equal(short[n], long[n]) for n in short if n.startswith("blocks.1."))


def test_accumulation_equals_one_larger_batch(tmp_path: Path) -> None:
    whole = batches(2, batch_size=8)
    halves = [
        {name: tensor.split(4)[half] for name, tensor in raw.items()}
        for raw in whole
        for half in (0, 1)
    ]
    options: dict[str, Any] = {"warmup_ratio": 0.0}
    one, _ = train(tmp_path / "a", "parallel_local", data=whole, **options)
    other, _ = train(
        tmp_path / "b", "parallel_local", data=halves, gradient_accumulation_steps=2, **options
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


def test_it_cannot_unfreeze_earlier_blocks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no gradient cross"):
        backbone_trainer(tmp_path, schedule="parallel_local", freeze_previous_blocks=False)


def test_kept_levels_spare_the_teacher_and_change_nothing(tmp_path: Path) -> None:
    def run(cache: str, **options: Any) -> tuple[dict[str, Tensor], int]:
        student = tiny_student(n_layer=3)
        trainer = backbone_trainer(
            tmp_path / cache,
            student,
            schedule="parallel_local",
            activation_cache=cache,
            audit_tokens=0,
            **options,
        )
        calls = [0]

        def count(*_: Any) -> None:
            calls[0] += 1

        trainer.teacher_model.transformer.h[-1].mlp.register_forward_hook(count)
        trainer.train_backbone(3, 1e-2)
        return weights_of(student), calls[0]

    (kept, few), (streamed, many) = run("ram"), run("off")
    assert (few, many) == (len(batches()) + MEASURED, 3 * len(batches()) + MEASURED)
    assert unchanged(kept, streamed) == kept.keys()
    assert run("auto", activation_cache_gb=1e-6)[1] == many  # no room


def test_the_levels_give_their_room_back_to_the_head_phase(tmp_path: Path) -> None:
    from distillation import DistillationTrainer
    from tests.builders import tiny_teacher

    teacher = tiny_teacher()
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    teacher.transformer.h[0].mlp.register_forward_hook(count)
    one_level = 4 * 4 * 12 * (32 + 16) * 4
    trainer = DistillationTrainer(
        teacher,
        tiny_student(n_layer=3),
        None,
        batches(),
        output_dir=tmp_path / "run",
        schedule="parallel_local",
        activation_cache_gb=1.1 * one_level / 1e9,
        audit_tokens=0,
    )
    trainer.train(1, 1e-2, lm_head_epochs=3, initialize_head_from_teacher=False)
    blocks, head, probes = len(batches()), len(batches()), 10  # passes to look at each stack
    assert (
        calls[0] <= blocks + MEASURED + head + probes
    )  # and not once more per batch and epoch of the head


def test_a_block_that_is_done_learning_drops_nothing_out(tmp_path: Path) -> None:
    student = tiny_student(n_layer=3, dropout=0.5)
    trainer = backbone_trainer(tmp_path, student, schedule="parallel_local")
    modes: list[tuple[bool, ...]] = []

    def look(*_: Any) -> None:
        modes.append(tuple(block.training for block in student.blocks))

    student.blocks[2].mlp.register_forward_hook(look)
    trainer.train_backbone([1, 2, 3], 1e-2)
    steps = len(batches())
    assert modes == [
        *[(True,) * 3] * steps,
        *[(False, True, True)] * steps,
        *[(False, False, True)] * steps,
        *[(False,) * 3] * MEASURED,
    ]
