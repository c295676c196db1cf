"""Hidden-state errors: identities, the mean predictor, least squares, and the layer map."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError
from distillation.evaluation.hidden_comparison import compare_hidden_states
from distillation.evaluation.hidden_states import (
    ErrorSums,
    block_pairs,
    fit_stitches,
    measure_blocks,
)
from distillation.evaluation.scoring_windows import Window, plan_windows, window_batches
from distillation.evaluation.training_record import local_errors, saved_layer_map
from stitching_layers import StitchingLayers

IDS = torch.randint(0, 67, (130,), generator=torch.Generator().manual_seed(5)).tolist()


def compare(student: Any, teacher: Any, **changes: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    options = {"stitches": None, "layer_map": None, "seq_len": 16, "batch_size": 3, **changes}
    found = compare_hidden_states(
        BlockStack(student), BlockStack(teacher), IDS, notes=notes, **options
    )
    return found, notes


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_the_teacher_has_no_error(family: str) -> None:
    from tests.builders import tiny_teacher

    model = tiny_teacher(family)
    found, notes = compare(model, model)
    assert found["stitch"] == "identity"
    assert found["num_positions"] == len(IDS) - 1
    assert notes == []
    for index, block in enumerate(found["blocks"]):
        assert (block["student_block"], block["teacher_block"]) == (index, index)
        assert block["mse"] == block["relative_error"] == 0.0
        assert block["cosine"] == pytest.approx(1.0)


def test_the_mean_predictor_has_relative_error_one() -> None:
    target = torch.randn(40, 6) * 3 + 5
    sums = ErrorSums()
    for rows in target.split(7):
        sums.add(target.mean(0).expand(len(rows), -1), rows)
    block = sums.result(0, 0)
    assert block["relative_error"] == pytest.approx(1.0, rel=1e-5)
    assert block["mse"] == pytest.approx(target.var(0, unbiased=False).mean().item(), rel=1e-5)


def test_each_block_meets_its_mapped_block_through_its_own_stitch() -> None:
    from tests.builders import tiny_student, tiny_teacher

    student, teacher = tiny_student("Factored").eval(), tiny_teacher("gpt2")
    stitches = StitchingLayers((1, 2), 16, 32)
    for stitch in stitches:
        nn.init.normal_(stitch.projection.bias)
    found, _ = compare(student, teacher, stitches=stitches.requires_grad_(False))
    assert found["stitch"] == "saved"
    windows = plan_windows(len(IDS), 16, 16)
    expected: list[float] = []
    for index, teacher_block in enumerate((1, 2)):
        errors: list[torch.Tensor] = []
        for window in windows:
            row = torch.tensor([IDS[window.start : window.end]])
            own = BlockStack(student).block_hidden_states(row)[index + 1]
            theirs = BlockStack(teacher).block_hidden_states(row)[teacher_block + 1]
            kept = slice(window.first_scored - window.start, None)
            errors.append((stitches[index](own) - theirs)[0, kept])
        expected.append(torch.cat(errors).square().mean().item())
    assert [b["mse"] for b in found["blocks"]] == pytest.approx(expected, rel=1e-5)
    assert [b["teacher_block"] for b in found["blocks"]] == [1, 2]


def test_padding_is_not_measured() -> None:
    from tests.builders import tiny_student, tiny_teacher

    student, teacher = BlockStack(tiny_student("SASP").eval()), BlockStack(tiny_teacher("gpt2"))
    windows = [Window(0, 16, 0), Window(16, 21, 16)]
    stitches = [stitch.double() for stitch in StitchingLayers((0, 2), 16, 32)]

    def measure(batch_size: int) -> Any:
        batches = window_batches(IDS, windows, batch_size)
        pairs = (block_pairs(student, teacher, (0, 2), batch) for batch in batches)
        cast = [lambda state, s=stitch: s(state.double()) for stitch in stitches]
        return measure_blocks(pairs, (0, 2), cast)

    padded, alone = measure(2), measure(1)
    assert padded[1] == alone[1] == 21
    for one, other in zip(padded[0], alone[0], strict=True):
        assert one["mse"] == pytest.approx(other["mse"], rel=1e-5)
        assert one["cosine"] == pytest.approx(other["cosine"], rel=1e-5)


def test_without_stitches_they_are_fitted_and_the_report_says_so() -> None:
    from tests.builders import tiny_student, tiny_teacher

    found, notes = compare(tiny_student("Vanilla").eval(), tiny_teacher("gpt2"))
    assert found["stitch"] == "least_squares"
    assert found["num_positions"] < len(IDS) - 1
    assert any("least-squares" in note for note in notes)
    assert any("No layer map" in note for note in notes)


def test_nothing_is_float64_on_the_device() -> None:
    from tests.evaluation_samples import without_float64

    own, theirs = without_float64(torch.randn(9, 4)), without_float64(torch.randn(9, 4))
    (stitch,) = fit_stitches([[(own, theirs)]], 1)
    assert stitch(own).dtype == torch.float64
    sums = ErrorSums()
    sums.add(own, theirs)
    assert sums.num_positions == 9


def test_a_deeper_student_is_compared_with_blocks_more_than_once() -> None:
    from tests.builders import tiny_student, tiny_teacher

    found, notes = compare(tiny_student("Vanilla", n_layer=4).eval(), tiny_teacher("gpt2"))
    assert found is not None
    assert [block["teacher_block"] for block in found["blocks"]] == [0, 1, 1, 2]
    assert "[0, 1, 1, 2], spread evenly" in notes[0]


def test_one_window_is_too_little_to_fit() -> None:
    from tests.builders import tiny_student, tiny_teacher

    found, notes = compare(tiny_student("Vanilla").eval(), tiny_teacher("gpt2"), seq_len=200)
    assert found is None
    assert "one window" in notes[-1]


@pytest.mark.parametrize("stitches", [((0, 5), 16, 32), ((0, 2), 16, 48), ((0, 1, 2), 16, 32)])
def test_stitches_of_another_run_are_refused(stitches: tuple[Any, int, int]) -> None:
    from tests.builders import tiny_student, tiny_teacher

    with pytest.raises(InputError, match="teacher"):
        compare(
            tiny_student("Vanilla").eval(),
            tiny_teacher("gpt2"),
            stitches=StitchingLayers(*stitches),
        )


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        "{",
        "[]",
        '{"stages": [{"block": 0, "steps": 2}]}',
        '{"stages": [{"block": 0, "steps": 0, "relative_error": 0.5}]}',
        '{"stages": [{"block": 0, "steps": 2, "relative_error": null}]}',
        '{"stages": [{"block": 1e999, "steps": 2, "relative_error": 0.5}]}',
        '{"stages": [{"block": "one", "steps": 2, "relative_error": 0.5}]}',
        '{"stages": [{"block": 0, "steps": 2, "relative_error": 1e999}]}',
        '{"stages": [{"block": 0, "steps": 2, "relative_error": 1' + 400 * "0" + "}]}",
        '{"stages": [{"block": 0, "steps": 2, "relative_error": {}}]}',
    ],
)
def test_local_errors_that_are_not_recorded_are_none(manifest: Any, tmp_path: Path) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    assert local_errors(tmp_path) == {}
    (tmp_path / "manifest.json").write_text(
        '{"stages": [{"block": 1, "steps": 2, "relative_error": 0.5}, {"stage": "lm-head"}]}'
    )
    assert local_errors(tmp_path) == {1: 0.5}


@pytest.mark.parametrize(
    ("saved", "found"),
    [
        ("[0, 2]", (0, 2)),
        ("[]", None),
        ("[1e999]", None),
        ("[true]", None),
        ('"12"', None),
        ("{}", None),
        ("null", None),
    ],
)
def test_a_damaged_layer_map_is_none(saved: str, found: Any, tmp_path: Path) -> None:
    assert saved_layer_map(tmp_path) is None
    (tmp_path / "manifest.json").write_text(f'{{"layer_map": {saved}}}')
    assert saved_layer_map(tmp_path) == found
    (tmp_path / "manifest.json").write_text('{"layer_map": [0, ')
    assert saved_layer_map(tmp_path) is None
