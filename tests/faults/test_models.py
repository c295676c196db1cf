"""Models and settings (C01, C11 and C13 of docs/faults.md); others are tested beside their code."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.errors import InputError, Stopped
from distillation.utils import load_checkpoint, save_checkpoint
from tests.builders import STUDENTS, batches, tiny_student, tiny_teacher
from tests.faults.small_runs import TRAINING, send_sigterm, small_trainer


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr", "--lr_per_block"),
        ("--n_layer", "--student_n_layer"),
        ("--batchsize", "--batch_size"),
        ("--epochs", "--epochs_per_block"),
        ("--Batch-Size", "--batch_size"),
        ("--teacher", "--teacher_model_name_or_path"),
        ("--output", "--output_dir"),
        ("--polish_epoch", "--polish_epochs"),
        ("--student_n_embbd", "--student_n_embd"),
    ],
)
def test_a_misspelt_or_half_remembered_flag_names_the_right_one(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from distillation.commands.flags import build_parser

    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([typed, "4"])
    assert stop.value.code == 2
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause == f"error: unknown flag {typed}"
    assert meant in remedy.split("?")[0]


def test_a_flag_like_no_other_gets_no_guess(capsys: pytest.CaptureFixture[str]) -> None:
    from distillation.commands.flags import build_parser

    with pytest.raises(SystemExit):
        build_parser().parse_args(["--zzz"])
    assert "Did you mean" not in capsys.readouterr().err


def decoded(model: Any, use_cache: bool) -> torch.Tensor:
    ids = batches(1)[0]["input_ids"][:2, :4]
    chosen: torch.Tensor = model.eval().generate(
        ids, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    return chosen


@pytest.mark.parametrize(
    "places",
    [
        [0, 2],
        pytest.param([0, 0, 1], marks=pytest.mark.slow),
        pytest.param([2, 1, 0], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_blocks_dropped_or_copied_by_hand_are_numbered_anew(
    places: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cached decoding finds a block's keys by its number; without a cache nothing looks there."""
    student = tiny_teacher(seed=4)
    blocks = [copy.deepcopy(student.transformer.h[place]) for place in places]
    student.transformer.h = torch.nn.ModuleList(blocks)
    student.config.n_layer = len(places)
    with caplog.at_level(logging.WARNING):
        small_trainer(tmp_path, student=student)
    was_stale = len(set(places)) < len(places) or max(places) >= len(places)
    assert ("are numbered anew" in caplog.text) == was_stale
    assert torch.equal(decoded(student, use_cache=True), decoded(student, use_cache=False))


def test_one_block_in_two_places_is_refused(tmp_path: Path) -> None:
    student = tiny_student()
    student.blocks[1] = student.blocks[0]
    with pytest.raises(InputError, match=r"2 blocks of the student are 1 modules.*\n.*deepcopy"):
        small_trainer(tmp_path, student=student)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_tied_head_is_the_embeddings_after_every_way_of_loading(
    kind: str, tmp_path: Path
) -> None:
    student = tiny_student(kind)
    student.save_pretrained(tmp_path / "folder")
    path = save_checkpoint(student, tmp_path / "a.pt")
    from_folder = type(student).from_pretrained(tmp_path / "folder")
    from_file = tiny_student(kind, seed=9)
    load_checkpoint(path, from_file)
    resized = tiny_student(kind)
    resized.resize_token_embeddings(70)
    for model in (student, from_folder, from_file, resized, copy.deepcopy(student)):
        assert model.lm_head.weight is model.wte.weight
    assert resized.lm_head.weight.shape[0] == 70


@pytest.mark.slow
def test_a_head_that_stays_tied_is_the_embeddings_after_a_run_and_after_going_on(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"head_tying": "tie"}
    own = small_trainer(tmp_path, send_sigterm, 10, **options)
    with pytest.raises(Stopped):
        own.train(**TRAINING)
    again = small_trainer(tmp_path, **options)
    again.train(**TRAINING)
    for model in (own.student_model, again.student_model):
        assert model.lm_head.weight is model.wte.weight
