"""The training loop: what must not change a result, and what it does with bad numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cleangpt.errors import InputError, NonFiniteError, UsageError
from distillation import DistillationTrainer
from tests.builders import (
    backbone_trainer,
    batches,
    padded,
    tiny_student,
    tiny_teacher,
    unchanged,
    weights_of,
)


def losses_of(tmp_path: Path, name: str, data: Any, **changes: Any) -> list[float]:
    """Per-step losses of a short run of both phases."""
    logged: list[float] = []
    # SGD: Adam's first step is a sign, which turns rounding into a step of full size.
    options = {
        "log_interval": 1,
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
        "optimizer_cls": torch.optim.SGD,
        **changes,
    }
    trainer = DistillationTrainer(
        tiny_teacher(), tiny_student(), None, data, output_dir=tmp_path / name, **options
    )
    trainer.train(1, 1e-2, lm_head_lr=1e-2, initialize_head_from_teacher=False)
    for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "step":
            logged.append(record["loss"])
    return logged


def ragged() -> list[dict[str, Tensor]]:
    """Four batches of two rows, of different lengths."""
    return [batches(1, 2, length, seed=length)[0] for length in (5, 9, 7, 12)]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of several batches as one, padded on the right to the longest."""
    longest = max(part["input_ids"].shape[1] for part in parts)
    rows = [padded(part, longest - part["input_ids"].shape[1]) for part in parts]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def test_accumulation_padding_and_batch_split_change_nothing(tmp_path: Path) -> None:
    parts = ragged()
    whole = losses_of(tmp_path, "whole", [joined(parts)] * 1)
    pairs = losses_of(
        tmp_path, "pairs", [joined(parts[:2]), joined(parts[2:])], gradient_accumulation_steps=2
    )
    singles = losses_of(tmp_path, "singles", parts, gradient_accumulation_steps=4)
    extra = losses_of(tmp_path, "extra", [padded(joined(parts), 4)])
    assert whole == pytest.approx(singles, rel=1e-5)
    assert whole == pytest.approx(pairs, rel=1e-5)
    assert whole == pytest.approx(extra, rel=1e-5)


def test_accumulation_gives_the_same_gradient_norm(tmp_path: Path) -> None:
    """Adam hides a wrong gradient scale from the loss; plain SGD without clipping does not."""
    parts = ragged()

    def moved(name: str, data: Any, steps: int) -> dict[str, Tensor]:
        student = tiny_student(n_layer=1)
        trainer = DistillationTrainer(
            tiny_teacher(),
            student,
            None,
            data,
            output_dir=tmp_path / name,
            optimizer_cls=torch.optim.SGD,
            gradient_accumulation_steps=steps,
            warmup_ratio=0.0,
        )
        trainer.train(1, 0.1, wd_per_block=0.0, max_grad_norm_per_block=1e9, train_lm_head=False)
        return weights_of(student)

    whole, singles = moved("whole", [joined(parts)], 1), moved("singles", parts, 4)
    for name in whole:
        torch.testing.assert_close(whole[name], singles[name], rtol=1e-4, atol=1e-6)


def test_two_runs_are_bit_equal(tmp_path: Path) -> None:
    assert losses_of(tmp_path, "a", batches()) == losses_of(tmp_path, "b", batches())


def test_non_finite_losses_are_skipped_counted_and_finally_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = backbone_trainer(tmp_path, tiny_student(n_layer=1), max_nonfinite_in_a_row=3)
    good, calls = trainer.hidden_state_loss_fn, 0

    def broken(student: Tensor, teacher: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return good(student, teacher) * (math.nan if calls == 2 else 1.0)

    trainer.hidden_state_loss_fn = broken
    row = trainer.train_backbone(1, 1e-3)["blocks"][0]
    assert (row["steps"], row["skipped"]) == (3, 1)
    assert "Loss is nan. Skipping batch." in caplog.text
    assert math.isfinite(row["last_loss"])

    stopping = backbone_trainer(tmp_path / "b", tiny_student(n_layer=1), max_nonfinite_in_a_row=3)
    stopping.hidden_state_loss_fn = lambda s, t: good(s, t) * math.inf
    with pytest.raises(
        NonFiniteError,
        match=r"block-00, step 3: 3 batches in a row; the last finite loss was nan",
    ) as error:
        stopping.train_backbone(1, 1e-3)
    assert error.value.exit_code == 6
    assert "max_grad_norm_per_block" in error.value.remedy


def test_a_nan_gradient_does_not_reach_the_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = tiny_student(n_layer=1)
    trainer = backbone_trainer(tmp_path, student, batches(1))
    good = trainer.hidden_state_loss_fn

    def nan_gradient(a: Tensor, b: Tensor) -> Tensor:
        a.register_hook(lambda gradient: gradient * math.nan)
        return good(a, b)

    trainer.hidden_state_loss_fn = nan_gradient
    before = weights_of(student)
    trainer.train_backbone(1, 1e-3)
    assert unchanged(before, weights_of(student)) == before.keys()
    assert "Gradient norm is nan. Skipping batch." in caplog.text


def test_a_batch_without_valid_positions_is_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = batches(1)[0]
    empty["attention_mask"] = torch.zeros_like(empty["attention_mask"])
    trainer = backbone_trainer(tmp_path, tiny_student(n_layer=1), [batches(1)[0], empty])
    row = trainer.train_backbone(1, 1e-3)["blocks"][0]
    assert (row["steps"], row["skipped"]) == (1, 1)
    assert "block-00, step 2: no valid position. Skipping batch." in caplog.text


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "dataset"])
def test_the_usual_loaders_work(tmp_path: Path, form: str) -> None:
    ids = torch.cat([batch["input_ids"] for batch in batches()])
    forms: dict[str, Any] = {
        "tensor": list(ids.split(4)),
        "tuple": [(part, torch.ones_like(part)) for part in ids.split(4)],
        "mapping": [{"input_ids": part} for part in ids.split(4)],
        "dataset": DataLoader(TensorDataset(ids), batch_size=4, shuffle=True),
    }
    rows = backbone_trainer(tmp_path, data=forms[form]).train_backbone(1, 1e-3)["blocks"]
    assert [row["tokens"] for row in rows] == [ids.numel()] * 2


def test_batches_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    long = batches(1, seq_len=40)
    with pytest.raises(UsageError, match="sequences of 40 tokens, and the teacher's context is 32"):
        backbone_trainer(tmp_path / "a", data=long).train_backbone(1, 1e-3)
    foreign = [{"input_ids": torch.full((2, 4), 90)}]
    with pytest.raises(InputError, match="Token id 90 is outside of the teacher's vocabulary"):
        backbone_trainer(tmp_path / "b", data=foreign).train_backbone(1, 1e-3)
    with pytest.raises(InputError, match="yielded a str without token ids"):
        backbone_trainer(tmp_path / "c", data=["text"]).train_backbone(1, 1e-3)


def test_norms_biases_gains_and_stitches_get_no_weight_decay(tmp_path: Path) -> None:
    seen: list[Any] = []

    def optimizer(groups: Any, lr: float) -> Any:
        seen.append(groups)
        return torch.optim.AdamW(groups, lr=lr)

    student = tiny_student("SASP", bias=True)
    backbone_trainer(tmp_path, student, optimizer_cls=optimizer).train_backbone(
        1, 1e-3, wd_per_block=0.3
    )
    for groups in seen:
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
        assert all(p.ndim >= 2 for p in groups[0]["params"])
        stitches = [p for p in groups[1]["params"] if p.ndim >= 2]
        assert [tuple(p.shape) for p in stitches] == [(32, 16)]


def test_dropout_acts_only_in_the_block_in_training(tmp_path: Path) -> None:
    trainer = backbone_trainer(tmp_path, tiny_student(dropout=0.5))
    modes: list[Any] = []
    train_stage = trainer.train_stage

    def watch(stage: Any, settings: Any) -> Any:
        loss = stage.loss

        def look(batch: Any) -> Tensor:
            modes.append([block.training for block in trainer.student_model.blocks])
            assert not trainer.teacher_model.training
            return loss(batch)

        stage.loss = look
        return train_stage(stage, settings)

    trainer.train_stage = watch
    trainer.train_backbone(1, 1e-3)
    assert [True, False] in modes
    assert [False, True] in modes
    assert [True, True] not in modes


def test_first_positions_can_be_left_out_of_the_hidden_loss(tmp_path: Path) -> None:
    """The loss of a window without its first token is the loss over the other positions."""
    seen: list[Tensor] = []

    def look(student: Tensor, teacher: Tensor) -> Tensor:
        seen.append(teacher)
        return (student - teacher).square().mean()

    data = [padded(batches(1)[0], 3, "left")]
    trainer = backbone_trainer(tmp_path, tiny_student(n_layer=1), data, first_hidden_position=2)
    trainer.hidden_state_loss_fn = look
    row = trainer.train_backbone(1, 1e-3)["blocks"][0]
    with torch.no_grad():
        whole = trainer.teacher.block_hidden_states(**batches(1)[0])[-1]
    assert row["tokens"] == 4 * 10
    torch.testing.assert_close(seen[0], whole[:, 2:].reshape(40, -1), rtol=1e-4, atol=1e-4)


def test_no_gradient_stays_on_the_student(tmp_path: Path) -> None:
    trainer = backbone_trainer(tmp_path)
    trainer.train_backbone(1, 1e-2)
    assert all(parameter.grad is None for parameter in trainer.student_model.parameters())
    assert trainer.stitches is not None
    assert all(parameter.grad is None for parameter in trainer.stitches.parameters())
