"""The recipe "best" on tiny models: what it starts from, and what it must never spoil."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.blocks import BlockStack
from distillation import DistillationTrainer
from distillation.losses.divergence import tempered_kl
from distillation.recipes import RECIPES
from stitching_layers import stitches_to_bytes
from tests.builders import (
    BLOCKS,
    VANILLA_FIRST,
    WIDTH,
    backbone_trainer,
    batches,
    tiny_student,
    tiny_teacher,
)

HELD_OUT = batches(2, seed=77)


def distil(folder: Path, student: Any, **training: Any) -> dict[str, Any]:
    best = RECIPES["best"]
    trainer = DistillationTrainer(
        tiny_teacher(),
        student,
        None,
        batches(),
        output_dir=folder / "run",
        validation_dataloader=HELD_OUT,
        **best.options,
    )
    return trainer.train(**{**best.training, **training})


def kl_of(student: Any) -> float:
    ids = torch.cat([batch["input_ids"] for batch in HELD_OUT])
    with torch.no_grad():
        logits = student.eval()(ids).logits, tiny_teacher()(ids).logits
    return float(tempered_kl(*(each.flatten(0, 1) for each in logits), temperature=1.0))


@pytest.mark.parametrize("kind", VANILLA_FIRST)
def test_it_trains_every_kind_of_student(tmp_path: Path, kind: str) -> None:
    student = tiny_student(kind)
    before = kl_of(student)
    results = distil(tmp_path, student, polish_epochs=8)
    assert results["polish"]["last_loss"] < results["polish"]["first_loss"]
    assert kl_of(student) < 0.8 * before


@pytest.mark.slow
def test_a_student_that_is_the_teacher_stays_it(tmp_path: Path) -> None:
    student = tiny_student(n_layer=BLOCKS, n_embd=WIDTH, n_head=4, bias=True)
    distil(tmp_path, student)
    assert kl_of(student) < 1e-4


def test_a_student_as_wide_that_starts_from_the_teacher_has_no_stitches(tmp_path: Path) -> None:
    def stitched(name: str, **shape: Any) -> bool:
        start = shape.pop("start", "pca")
        trainer = DistillationTrainer(
            *(tiny_teacher(), tiny_student(**shape), None, batches()),
            output_dir=tmp_path / name,
            **{**RECIPES["best"].options, "early_stop_patience": 0, "init_from_teacher": start},
        )
        trainer.train(1, 1e-3, lm_head_epochs=0)
        return (tmp_path / name / "stitching_layers.safetensors").exists()

    as_wide = {"n_embd": WIDTH, "n_head": 4}
    assert not stitched("as wide", n_layer=1, **as_wide)
    assert stitched("narrower", n_layer=1)
    assert stitched("from nothing", n_layer=1, start="none", **as_wide)
    best = {k: RECIPES["best"].settings_for(k) for k in ("Vanilla", "Factored", "SASP")}
    assert [k for k in best if best[k]["stitch_equal_widths"]] == ["SASP"]


def test_stitches_start_as_the_best_read_out_of_the_untrained_block(tmp_path: Path) -> None:
    def first_loss(name: str, start: str) -> float:
        trainer = backbone_trainer(
            tmp_path / name, tiny_student(n_layer=1), distill_loss_type="nmse", stitch_start=start
        )
        (row,) = trainer.train_backbone(1, 1e-9)["blocks"]
        return float(row["last_loss"])

    fitted, random = first_loss("fitted", "least_squares"), first_loss("random", "random")
    assert fitted < 0.97 < 1.0 < random  # the mean predictor has 1


@pytest.mark.parametrize("polished", [pytest.param(False, marks=pytest.mark.slow), True])
def test_fixed_stitches_stay_as_they_start(tmp_path: Path, polished: bool) -> None:
    def train(name: str, epochs: int, *, learn: bool) -> tuple[bytes, dict[str, Any]]:
        trainer = DistillationTrainer(
            tiny_teacher(),
            tiny_student(),
            None,
            batches(),
            output_dir=tmp_path / name,
            distill_loss_type="nmse",
            train_stitches=learn,
            polish_hidden_weight=float(polished),
        )
        results = trainer.train(
            epochs, 1e-2, lm_head_epochs=0, polish_epochs=int(polished and epochs > 0)
        )
        assert trainer.backbone_trainer.stitches is not None
        return stitches_to_bytes(trainer.backbone_trainer.stitches), results

    start, _ = train("start", 0, learn=True)
    fixed, results = train("fixed", 3, learn=False)
    assert fixed == start
    assert all(row["last_loss"] < row["first_loss"] for row in results["blocks"])
    assert train("learning", 3, learn=True)[0] != start


def test_a_stitch_without_bias_is_fitted_too(tmp_path: Path) -> None:
    trainer = backbone_trainer(
        tmp_path,
        tiny_student(n_layer=1),
        distill_loss_type="nmse",
        stitch_start="least_squares",
        stitching_layer_bias=False,
    )
    (row,) = trainer.train_backbone(1, 1e-9)["blocks"]
    assert row["last_loss"] <= 1.001


@pytest.mark.parametrize("loss", ["nmse", "smooth_l1", "whiten"])
def test_the_last_stitch_reads_the_teachers_normalised_state(tmp_path: Path, loss: str) -> None:
    from distillation.losses.target_statistics import token_normalised

    student = tiny_student(n_layer=1)
    trainer = backbone_trainer(
        tmp_path, student, distill_loss_type=loss, stitch_start="least_squares"
    )
    trainer.train_backbone(0, 1e-3)
    stitch = trainer.last_read_out()
    ids = torch.cat([batch["input_ids"] for batch in batches()])
    with torch.no_grad():
        state = BlockStack(student.eval()).block_hidden_states(ids)[-1].flatten(0, 1)
        target = token_normalised(
            BlockStack(tiny_teacher()).block_hidden_states(ids)[-1].flatten(0, 1)
        )
        error = (stitch(state) - target).square().sum()
        variation = (target - target.mean(0)).square().sum()
    assert error < 1.001 * variation
    # The best linear read-out cannot be far below it: it was fitted on these positions.
    from distillation.least_squares import LeastSquares

    sums = LeastSquares()
    sums.add(state, target)
    weight, intercept = sums.regression()
    best = (state.double() @ weight.T + intercept - target).square().sum()
    assert error == pytest.approx(float(best), rel=0.02)
