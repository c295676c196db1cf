"""The benchmark's naive loops do the library's work: same losses, step for step, at tiny shapes."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory, speed
from benchmarks.against_naive import measure_backbone
from benchmarks.cases import (
    Shape,
    before_block,
    before_head,
    new_student,
    new_teacher,
    starting_stitches,
    windows_loader,
)
from benchmarks.naive import naive_block, naive_end_to_end, naive_head
from benchmarks.ours import train_our_backbone, train_ours
from benchmarks.real_teacher import RealCase
from benchmarks.spread import ratios, relative_difference, spread
from cleangpt.errors import UsageError
from distillation.config import StageSettings
from tests.builders import STUDENTS, batches, padded, tiny_student, tiny_teacher

TINY = Shape(
    blocks=2,
    teacher_width=64,
    student_width=16,
    student_heads=2,
    vocab=67,
    batch_size=2,
    seq_len=12,
    batches=3,
    epochs=2,
)
SETTINGS = StageSettings(epochs=TINY.epochs, lr=1e-2)


def naive_backbone_losses(teacher: Any, student: Any, loader: Any) -> list[float]:
    stitches = starting_stitches(teacher, student)
    return [
        naive_block(teacher, student, stitch, block, loader, SETTINGS).run()[-1].loss
        for block, stitch in enumerate(stitches)
    ]


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_naive_backbone_has_our_losses(kind: str, dropout: float) -> None:
    shape = dataclasses.replace(TINY, dropout=dropout)
    teacher, start, loader = new_teacher(shape), new_student(kind, shape), windows_loader(shape)
    ours = train_our_backbone(
        teacher, start, loader, epochs=shape.epochs, lr=1e-2, precision="fp32"
    )
    naive = naive_backbone_losses(teacher, copy.deepcopy(start), loader)
    assert naive == pytest.approx([row["last_loss"] for row in ours.blocks], rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_naive_backbone_has_our_losses_on_padded_batches(family: str) -> None:
    teacher, start = tiny_teacher(family), tiny_student(n_layer=3)
    loader = [padded(batch, extra) for batch, extra in zip(batches(3), (3, 0, 1), strict=True)]
    ours = train_our_backbone(teacher, start, loader, epochs=TINY.epochs, lr=1e-2, precision="fp32")
    naive = naive_backbone_losses(teacher, copy.deepcopy(start), loader)
    assert naive == pytest.approx([row["last_loss"] for row in ours.blocks], rel=1e-5)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_naive_block_or_head_can_start_from_our_student(kind: str) -> None:
    teacher, start, loader = new_teacher(TINY), new_student(kind, TINY), windows_loader(TINY)
    ours = train_ours(
        teacher, start, loader, epochs=2, lr=1e-2, head_epochs=2, head_lr=1e-2, precision="fp32"
    )
    assert ours.head is not None
    stitch: Any = starting_stitches(teacher, start)[1]
    block = naive_block(teacher, before_block(start, ours.student, 1), stitch, 1, loader, SETTINGS)
    head = naive_head(teacher, before_head(start, ours.student), loader, SETTINGS)
    assert block.run()[-1].loss == pytest.approx(ours.blocks[1]["last_loss"], rel=1e-5)
    assert head.run()[-1].loss == pytest.approx(ours.head["last_loss"], rel=1e-5)


def test_end_to_end_learns_in_every_part() -> None:
    teacher, student, loader = new_teacher(TINY), new_student("SASP", TINY), windows_loader(TINY)
    before = copy.deepcopy(student.state_dict())
    epochs = naive_end_to_end(teacher, student, loader, SETTINGS).run()
    assert epochs[-1].loss < epochs[0].loss
    moved = {
        name for name, tensor in student.state_dict().items() if (tensor != before[name]).any()
    }
    assert {name.split(".")[0] for name in moved} >= {"wte", "blocks", "final_norm", "lm_head"}


def run_command(names: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the command at tiny sizes, with the built-in teacher in the real one's place."""
    real = RealCase(teacher="builtin", blocks=2, width=64, batch_size=2, seq_len=16, batches=2)
    monkeypatch.setattr(speed, "sizes", lambda quick: (TINY, real, 1))
    apart = {"models": 1.0, "peak": 3.0}
    monkeypatch.setattr(memory, "measure_apart", lambda *arguments: apart)
    speed.main(["--only", ",".join(names), "--output", str(folder / "speed.json")])
    report: dict[str, Any] = json.loads((folder / "speed.json").read_text())
    assert list(report["sections"]) == names
    markdown = (folder / "speed.md").read_text()
    for section in report["sections"].values():
        assert section["rows"]
        assert all(len(row) == len(section["columns"]) for row in section["rows"])
        assert f"## {section['title']}" in markdown
    return report


SLOW_SECTIONS = {"end_to_end", "tokens", "widths", "smollm2"}


@pytest.mark.slow
def test_the_command_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in speed.SECTIONS if name not in SLOW_SECTIONS]
    report = run_command(names, tmp_path, monkeypatch)
    losses = report["sections"]["backbone"]["notes"][1]
    assert "block 0: naive" in losses


@pytest.mark.slow
def test_the_command_writes_its_other_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in speed.SECTIONS if name in SLOW_SECTIONS]
    run_command(names, tmp_path, monkeypatch)


def test_the_whole_naive_backbone_ends_at_our_losses() -> None:
    section = measure_backbone(("Vanilla",), TINY, full=True)
    exact = re.search(r"fp32 (\S+),", section.notes[1])
    assert exact is not None
    assert float(exact[1]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("phase", memory.PHASES)
def test_every_phase_of_the_memory_table_runs(phase: str) -> None:
    found = memory.run_phase(phase, "fp32", "SASP", TINY)
    # At this size nothing is allocated that the process had not; the kernel counts in steps.
    assert found["peak"] > found["models"] - 1 > 0


def test_the_peak_of_memory_is_seen_after_it_was_given_back() -> None:
    memory.forget_peak()
    before = memory.peak_mib("cpu")
    block = torch.ones(64, 2**18)
    assert block.nbytes == 64 * memory.MIB
    del block
    assert memory.peak_mib("cpu") > before + 50


def test_unknown_sections_are_refused() -> None:
    with pytest.raises(UsageError, match="Unknown section bakcbone"):
        speed.chosen_sections("head,bakcbone")


def test_a_spread_is_told_as_median_and_range() -> None:
    assert str(ratios([20.0, 30.0, 44.0], [2.0, 2.0, 4.0])) == "11 (10 to 15)"
    assert str(spread([0.01234])) == "0.0123"
    assert relative_difference(2.0, -2.0) == 2.0
