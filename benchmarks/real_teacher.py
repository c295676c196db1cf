"""One whole run with a real pretrained teacher, stage by stage, against the naive loop."""

import copy
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Subset

from benchmarks.against_naive import HEAD_LR, LR
from benchmarks.cases import starting_stitches
from benchmarks.naive import NaiveLoop, naive_block, naive_head
from benchmarks.ours import PRECISIONS, OurRun, train_ours
from benchmarks.report import Section
from benchmarks.spread import ratios, relative_difference, spread
from cleangpt.blocks import BlockStack
from config_distillation import GPTConfig
from distillation.config import StageSettings
from model import build_student

DOCUMENTS = 20
"""Of the built-in text; they fill about a hundred windows of 128 tokens."""


@dataclass(frozen=True, kw_only=True)
class RealCase:
    """Sizes of the run.

    Args:
        teacher: Its name for ``load_teacher``.
        blocks: Blocks of the student.
        width: Its hidden size, a multiple of 64.
        batch_size: Windows per batch.
        seq_len: Tokens per window.
        batches: Batches of the data.
        epochs: Passes, per block and of the head.
    """

    teacher: str = "smollm2"
    blocks: int = 6
    width: int = 384
    batch_size: int = 8
    seq_len: int = 128
    batches: int = 2
    epochs: int = 3


def measure_real_teacher(kind: str, case: RealCase, repeats: int) -> Section:
    """All stages of a run on text, with two naive steps of each stage in each turn.

    Raises:
        EnvironmentProblem: If the teacher is not installed.
        InputError: If the text does not fill the windows.
    """
    teacher, loader = teacher_and_windows(case)
    stack = BlockStack(teacher)
    start = build_student(
        GPTConfig(
            block_size=case.seq_len,
            vocab_size=stack.vocab_size,
            n_layer=case.blocks,
            n_head=case.width // 64,
            n_embd=case.width,
            dropout=0.0,
            model_type=kind,
        )
    )
    section = Section(
        f"A real teacher: {case.teacher} ({stack.num_blocks}x{stack.hidden_size}, vocabulary"
        f" {stack.vocab_size}), {kind} {case.blocks}x{case.width}, {case.epochs} epochs,"
        f" {case.batches} batches of {case.batch_size}x{case.seq_len}, built-in text",
        ["stage", "naive s", *(f"ours {p} s" for p in PRECISIONS), *ratio_columns()],
    )
    ours: dict[str, list[OurRun]] = {precision: [] for precision in PRECISIONS}
    loops: list[NaiveLoop] = []
    naive: list[list[float]] = []
    for _ in range(repeats):
        for precision, runs in ours.items():
            run = train_ours(
                *(teacher, start, loader),
                epochs=case.epochs,
                lr=LR,
                head_epochs=case.epochs,
                head_lr=HEAD_LR,
                precision=precision,
            )
            runs.append(run)
        loops = loops or naive_stages(teacher, start, loader, case)
        # Freezing is set when a loop is made, and each has a student of its own.
        steps = case.batches * case.epochs
        # The second of two steps: the first one of a loop allocates the optimizer's states.
        naive.append([steps * loop.epoch(max_steps=2).step_seconds[-1] for loop in loops])
    add_rows(section, naive, ours)
    section.notes.append(
        "naive: the second of two steps of each stage in each turn, times the number of steps. The"
        " first stage of ours fills the store. Whole run: all of ours, with saving the student."
    )
    own = ours["fp32"][0].blocks[0]["last_loss"]
    whole = naive_stages(teacher, start, loader, case)[0].run()[-1].loss
    section.notes.append(
        f"Final losses: {final_losses(ours)}; block 0, run whole: naive {whole:.7g}, ours fp32"
        f" {own:.7g} ({relative_difference(whole, own):.0e} apart)."
    )
    return section


def ratio_columns() -> list[str]:
    """The heads of the columns that compare."""
    return [f"naive / ours {precision}" for precision in PRECISIONS]


def teacher_and_windows(case: RealCase) -> tuple[Any, Any]:
    """The teacher's model, and a shuffled loader of full windows of the built-in text."""
    from cleangpt.data import DistillationDataCollator, TextDataset, load_texts
    from cleangpt.teacher import load_teacher

    teacher = load_teacher(case.teacher)
    texts = load_texts("builtin", max_samples=DOCUMENTS).texts
    dataset: Any = TextDataset(texts, teacher.tokenizer, case.seq_len)
    windows = Subset(dataset, range(min(len(dataset) - 1, case.batches * case.batch_size)))
    collate = DistillationDataCollator(teacher.tokenizer, case.seq_len)
    loader: Any = DataLoader(
        windows, batch_size=case.batch_size, shuffle=True, collate_fn=collate, drop_last=True
    )
    return teacher.model, loader


def naive_stages(teacher: Any, start: Any, loader: Any, case: RealCase) -> list[NaiveLoop]:
    """The naive loops of all stages; the state of what was trained before does not matter here."""
    loops = []
    stitches = starting_stitches(teacher, start)
    for block, target in enumerate(stitches.layer_map):
        stitch: Any = stitches[block]
        settings = StageSettings(epochs=case.epochs, lr=LR)
        student = copy.deepcopy(start)
        loop = naive_block(
            *(teacher, student, stitch, block, loader, settings), teacher_block=target
        )
        loops.append(loop)
    settings = StageSettings(epochs=case.epochs, lr=HEAD_LR)
    return [*loops, naive_head(teacher, copy.deepcopy(start), loader, settings)]


def add_rows(section: Section, naive: list[list[float]], ours: dict[str, list[OurRun]]) -> None:
    """One line per stage, and one for the whole run."""
    stages = len(naive[0])
    for stage in range(stages):
        slow = [turn[stage] for turn in naive]
        fast = [[stage_rows(run)[stage]["seconds"] for run in runs] for runs in ours.values()]
        name = stage_rows(ours["fp32"][0])[stage]["stage"]
        section.add(name, spread(slow), *map(spread, fast), *(ratios(slow, own) for own in fast))
    slow = [sum(turn) for turn in naive]
    fast = [[run.total_seconds for run in runs] for runs in ours.values()]
    section.add("whole run", spread(slow), *map(spread, fast), *(ratios(slow, own) for own in fast))


def stage_rows(run: OurRun) -> list[dict[str, Any]]:
    """The rows of all blocks, and the head's."""
    assert run.head is not None
    return [*run.blocks, run.head]


def final_losses(ours: dict[str, list[OurRun]]) -> str:
    """How far apart the precisions end."""
    exact, default = (stage_rows(ours[precision][0]) for precision in PRECISIONS)
    apart = [
        relative_difference(a["last_loss"], b["last_loss"])
        for a, b in zip(exact, default, strict=True)
    ]
    return f"default against fp32, at most {max(apart):.0e} apart, relative"
