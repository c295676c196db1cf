"""Layer maps, and runs that train some of the blocks of a student that exists."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.errors import UsageError
from distillation import DistillationTrainer
from tests.builders import batches, tiny_student, tiny_teacher, unchanged, weights_of


def trainer(folder: Path, student: Any, **options: Any) -> DistillationTrainer:
    data = batches(2)
    return DistillationTrainer(
        tiny_teacher(), student, None, data, output_dir=folder / "run", precision="fp32", **options
    )


def trained_blocks(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    changed = before.keys() - unchanged(before, after)
    return {name.split(".")[1] for name in changed if name.startswith("blocks.")}


@pytest.mark.parametrize(("wanted", "taught"), [("first", [0, 1]), ("last", [1, 2]), ([0, 2],) * 2])
def test_the_map_decides_what_is_learnt(wanted: Any, taught: list[int], tmp_path: Path) -> None:
    own = trainer(tmp_path, tiny_student(), layer_map=wanted)
    results = own.train(epochs_per_block=1, lr_per_block=1e-3, polish_epochs=1)
    assert [row["teacher_block"] for row in results["blocks"]] == taught
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["layer_map"] == wanted
    from stitching_layers import load_stitches

    saved = load_stitches(tmp_path / "run" / "stitching_layers.safetensors")
    assert list(saved.layer_map) == taught


DEEP = [("sequential", "ram"), ("sequential", "off"), ("parallel_local", "ram")]


@pytest.fixture(scope="module")
def deep_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Any]]:
    """The rows of runs of five blocks under a teacher of three."""
    found = {}
    for schedule, cache in DEEP:
        folder = tmp_path_factory.mktemp("deep")
        options = {"schedule": schedule, "activation_cache": cache, "audit_tokens": 0}
        options |= {"stitch_start": "least_squares", "polish_hidden_weight": 1.0}
        own = trainer(folder, tiny_student(n_layer=5), **options)
        training = {"train_lm_head": False, "polish_epochs": 1}
        results = own.train(epochs_per_block=6, lr_per_block=3e-3, **training)
        found[schedule, cache] = results["blocks"]
    return found


def test_a_deeper_student_refines_a_level_block_by_block(
    deep_runs: dict[tuple[str, str], list[Any]],
) -> None:
    for (schedule, _), rows in deep_runs.items():
        assert [row["teacher_block"] for row in rows] == [0, 0, 1, 2, 2]
        assert all(row["last_loss"] < row["first_loss"] for row in rows)
        errors = [row["relative_error"] for row in rows]
        if schedule == "sequential":
            assert errors[1] < 0.9 * errors[0]
            assert errors[4] < errors[3]


def test_a_deeper_student_learns_the_same_with_and_without_kept_states(
    deep_runs: dict[tuple[str, str], list[Any]],
) -> None:
    kept, streamed = (deep_runs["sequential", cache] for cache in ("ram", "off"))
    for one, other in zip(kept, streamed, strict=True):
        assert one["last_loss"] == other["last_loss"]


def test_a_bad_map_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\[0, 3\] does not fit.*\n.*such as 1,2"):
        trainer(tmp_path, tiny_student(), layer_map=[0, 3])
    with pytest.raises(UsageError, match="layer_map='middle' must be one of uniform, first, last"):
        trainer(tmp_path, tiny_student(), layer_map="middle")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule", ["sequential", "parallel_local"])
def test_only_the_named_blocks_learn(schedule: str, tmp_path: Path) -> None:
    student = tiny_student(n_layer=3)
    before = weights_of(student)
    own = trainer(tmp_path, student, blocks=[1], schedule=schedule, overfit_gate=True)
    results = own.train(epochs_per_block=1, lr_per_block=1e-2, train_lm_head=False)
    after = student.state_dict()
    assert trained_blocks(before, after) == {"1"}
    assert torch.equal(before["wte.weight"], after["wte.weight"])
    verdicts = [row["verdict"] for row in results["blocks"]]
    assert verdicts[0] == verdicts[2] == "not trained"
    assert verdicts[1] != "not trained"


def test_blocks_in_two_runs_are_the_blocks_of_one(tmp_path: Path) -> None:
    whole, parts = tiny_student(n_layer=3), tiny_student(n_layer=3)
    options: dict[str, Any] = {"stitch_start": "least_squares"}
    training: dict[str, Any] = {"epochs_per_block": 2, "lr_per_block": 1e-2, "train_lm_head": False}
    trainer(tmp_path / "whole", whole, **options).train(**training)
    for name, blocks in (("a", [0, 1]), ("b", [2])):
        trainer(tmp_path / name, parts, blocks=blocks, **options).train(**training)
    assert unchanged(weights_of(whole), weights_of(parts)) == set(weights_of(whole))


def test_blocks_that_do_not_learn_are_read_out_as_well_as_they_can_be(tmp_path: Path) -> None:
    """The head starts from the last block's stitch, which must not be random."""
    student = tiny_student(n_layer=3)
    own = trainer(tmp_path, student, blocks=[0])
    own.train(epochs_per_block=1, lr_per_block=1e-2)
    last = own.backbone_trainer.stitches
    assert last is not None
    read_out = last[-1].projection.weight.detach().clone()
    from distillation.stages import BlockStage

    stage: BlockStage = own.backbone_trainer._stage(2, own.backbone_trainer.activations)
    stage.fit_stitch(own.backbone_trainer.batches(0), 10_000)
    torch.testing.assert_close(last[-1].projection.weight, read_out, rtol=1e-4, atol=1e-5)


def test_blocks_the_student_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"blocks=\[5\] names \[5\]"):
        trainer(tmp_path, tiny_student(), blocks=[5])
