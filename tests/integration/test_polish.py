"""The last stage: the whole student learns end to end, on logits and, if asked, hidden states."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from distillation import DistillationTrainer
from distillation.trainers import PolishDistillationTrainer
from tests.builders import STUDENTS, batches, tiny_student, tiny_teacher, unchanged, weights_of


def whole_trainer(folder: Path, student: Any, **options: Any) -> DistillationTrainer:
    data = options.pop("data", None) or batches()
    return DistillationTrainer(
        tiny_teacher(), student, None, data, output_dir=folder / "run", **options
    )


def polish_trainer(folder: Path, student: Any, **options: Any) -> PolishDistillationTrainer:
    return PolishDistillationTrainer(
        tiny_teacher(), student, None, batches(), output_dir=folder / "run", **options
    )


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_part_of_the_student_moves_and_the_loss_falls(tmp_path: Path, kind: str) -> None:
    student = tiny_student(kind)
    before = weights_of(student)
    row = polish_trainer(tmp_path, student).train_polish(12, 1e-2)["polish"]
    assert row["last_loss"] < 0.8 * row["first_loss"]
    still = {name for name in unchanged(before, weights_of(student)) if "mean" not in name}
    assert still <= {"blocks.0.attention.query.weight"}  # SASP's zero queries may rest a step


def test_it_is_plain_logit_distillation(tmp_path: Path) -> None:
    """One step of SGD equals one written by hand."""
    from torch.nn import functional as F

    student, reference = tiny_student(), tiny_student()
    trainer = polish_trainer(
        tmp_path,
        student,
        optimizer_cls=torch.optim.SGD,
        lr_schedule="constant",
        warmup_ratio=0.0,
        logit_loss_temperature=1.0,
        logit_loss_weight=0.5,
        head_tying="tie",
    )
    trainer.train_dataloader = batches(1)
    trainer.train_polish(1, 0.1, 0.0, 1e9)

    ids = batches(1)[0]["input_ids"]
    target = F.log_softmax(tiny_teacher()(ids).logits, -1).detach()
    own = F.log_softmax(reference.train()(ids).logits, -1)
    loss = 0.5 * (target.exp() * (target - own)).sum(-1).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    for (name, ours), theirs in zip(
        student.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("tying", "tied"), [("untie", False), ("tie", True)])
def test_the_head_is_tied_as_asked(tmp_path: Path, tying: str, tied: bool) -> None:
    student = tiny_student()
    polish_trainer(tmp_path, student, head_tying=tying).train_polish(1, 1e-3)
    assert (student.lm_head.weight is student.wte.weight) == tied


def test_hidden_states_are_taught_along_and_their_weight_fades(tmp_path: Path) -> None:
    def losses(name: str, **options: Any) -> list[float]:
        trainer = whole_trainer(tmp_path / name, tiny_student(), log_interval=1, **options)
        trainer.train(1, 1e-3, train_lm_head=False, polish_epochs=2, polish_lr=1e-6)
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        return [s["loss"] for s in steps if s["event"] == "step" and s["stage"] == "polish"]

    plain = losses("plain")
    constant = losses("constant", polish_hidden_weight=1.0, polish_hidden_fade=False)
    fading = losses("fading", polish_hidden_weight=1.0)
    hidden = [c - p for c, p in zip(constant, plain, strict=True)]
    left = [f - p for f, p in zip(fading, plain, strict=True)]
    assert all(value > 0.01 for value in hidden)
    shares = [a / b for a, b in zip(left, hidden, strict=True)]
    assert shares == pytest.approx([1 - i / len(shares) for i in range(len(shares))], abs=0.02)


def test_a_run_with_a_polish_writes_it_down_and_refits_the_stitches(tmp_path: Path) -> None:
    from cleangpt.blocks import BlockStack
    from stitching_layers import load_stitches

    student = tiny_student()
    results = whole_trainer(tmp_path, student).train(
        1, 1e-2, lm_head_epochs=0, polish_epochs=3, polish_lr=1e-2
    )
    assert results["polish_loss"] == results["polish"]["last_loss"]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["polish_epochs"] == 3
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [stage["stage"] for stage in manifest["stages"]][-1] == "polish"

    # The stitches on disk read the student that is on disk: no small change makes them better.
    stitches = load_stitches(tmp_path / "run")
    ids = torch.cat([batch["input_ids"] for batch in batches()])
    with torch.no_grad():
        state = BlockStack(student.eval()).block_hidden_states(ids)[-1].flatten(0, 1)
        target = BlockStack(tiny_teacher()).block_hidden_states(ids)[-1].flatten(0, 1)
        residual = target - stitches[-1](state)
        assert residual.mean(0).abs().max() < 1e-3 * target.std()
        assert (state.T @ residual / len(state)).abs().max() < 2e-3 * target.std() * state.std()


def test_without_a_polish_nothing_of_it_is_there(tmp_path: Path) -> None:
    results = whole_trainer(tmp_path, tiny_student()).train(1, 1e-2)
    assert results["polish"] is None
    assert results["polish_loss"] is None


@pytest.mark.parametrize("cache", ["ram", "off"])
def test_kept_teacher_states_change_nothing(tmp_path: Path, cache: str) -> None:
    def run(name: str, cache: str) -> dict[str, torch.Tensor]:
        student = tiny_student()
        trainer = whole_trainer(
            tmp_path / name, student, activation_cache=cache, polish_hidden_weight=0.5
        )
        trainer.train(1, 1e-2, polish_epochs=2, polish_lr=1e-2)
        return weights_of(student)

    reference, other = run("disk", "disk"), run(cache, cache)
    assert unchanged(reference, other) == set(reference)


def test_the_levels_have_the_room_of_the_states_kept_before(tmp_path: Path) -> None:
    class Counted(list[Any]):
        num_tokens = 16 * 12

    rows = [{k: v[row] for k, v in raw.items()} for raw in batches() for row in range(4)]
    data = DataLoader(Counted(rows), batch_size=4)  # type: ignore[arg-type]

    def teacher_passes(epochs: int, missing: int = 0) -> int:
        two_levels = 16 * 12 * (2 * 32) * 4
        trainer = whole_trainer(
            tmp_path / f"{epochs} {missing}",
            tiny_student(),
            data=data,
            activation_cache_gb=(two_levels - missing + 0.5) / 1e9,
            polish_hidden_weight=0.5,
            audit_tokens=0,
        )
        calls = [0]

        def count(*_: Any) -> None:
            calls[0] += 1

        teacher: Any = trainer.backbone_trainer.teacher_model
        teacher.transformer.h[0].mlp.register_forward_hook(count)
        trainer.train(1, 1e-3, polish_epochs=epochs)
        return calls[0]

    assert teacher_passes(1) == teacher_passes(3)
    assert teacher_passes(3, missing=1) - teacher_passes(1, missing=1) == 2 * len(data)


@pytest.mark.parametrize("rate", [1.0, 1e-3])
def test_a_rate_that_is_too_high_is_named(
    tmp_path: Path, rate: float, caplog: pytest.LogCaptureFixture
) -> None:
    polish_trainer(tmp_path, tiny_student()).train_polish(1, rate)
    said = "ended at a higher loss" in caplog.text and "Lower polish_lr" in caplog.text
    assert said == (rate == 1.0)
