"""How the cost of a block grows: with its depth (not at all), tokens, number of blocks, widths."""

import statistics
from dataclasses import replace
from typing import Any

from benchmarks.against_naive import LR
from benchmarks.cases import Shape, new_student, new_teacher, starting_stitches, windows_loader
from benchmarks.naive import naive_block
from benchmarks.ours import train_our_backbone
from benchmarks.report import Section
from benchmarks.roofline import matmul_flops
from benchmarks.spread import Spread, ratios, spread
from benchmarks.steady import Steps, block_steps
from distillation.config import StageSettings

MEASURED = 1
"""The block whose steps are timed: the first that trains no embeddings."""


def measure_depth(kind: str, shape: Shape, repeats: int) -> Section:
    """The cost of each block of one student."""
    section = Section(
        f"Cost of a block against its depth ({shape}, {kind}, default precision)",
        ["block", "ms per step", "of the middle block", "ms with filling and moving on"],
    )
    teacher, start = new_teacher(shape), new_student(kind, shape)
    runs = [block_steps(teacher, start, shape) for _ in range(repeats)]
    per_block: list[list[Steps]] = [list(steps) for steps in zip(*runs, strict=True)]
    steady = [spread(1e3 * s for run in steps for s in run.steady) for steps in per_block]
    middle = statistics.median(block.median for block in steady[1:])
    for block, steps in enumerate(per_block):
        charged = spread(1e3 * run.charged for run in steps)
        section.add(block, steady[block], steady[block].median / middle, charged)
    farthest = max(abs(block.median / middle - 1) for block in steady[1:])
    section.notes += [
        f"Blocks 1 to {shape.blocks - 1} differ from their middle by at most {farthest:.1%}.",
        f"Block 0 trains the embeddings with it ({shape.vocab} x {shape.student_width}: their"
        " gradient is dense, and the optimizer moves every row), reads no cached student state, and"
        " its first epoch runs the whole store's filling.",
    ]
    return section


def measure_tokens(kind: str, shape: Shape) -> Section:
    """One block's step at several batch sizes and lengths, with the naive step beside it."""
    section = Section(
        f"Cost of a step against its tokens (block {MEASURED} of a 2-block {kind},"
        f" {shape.teacher_width} to {shape.student_width}, default precision)",
        ["batch x length", "tokens", "ms per step", "us per token", "naive / ours"],
    )
    small = replace(shape, blocks=2)
    rows, length = small.batch_size, small.seq_len
    grid = [(rows // 4, length), (rows, length), (2 * rows, length)]
    grid += [(2 * rows, length // 2), (rows // 4, 4 * length)]
    for batch_size, seq_len in grid:
        case = replace(small, batch_size=max(1, batch_size), seq_len=seq_len)
        own, ratio = beside_naive(kind, case)
        tokens = case.tokens_per_batch
        name = f"{case.batch_size}x{case.seq_len}"
        section.add(name, tokens, own, 1e3 * own.median / tokens, ratio)
    section.notes.append(
        "Linear but for two shares: attention, which grows with the length, and the optimizer,"
        " whose work is per step and weighs on small batches. The naive ratio is at its worst"
        " here: a model of two blocks has little to leave out, and ours is charged with filling."
    )
    return section


def measure_widths(kind: str, shape: Shape) -> Section:
    """One block's step at several student widths, and at a shape that is all overhead."""
    section = Section(
        f"Cost of a step against the student's width (block {MEASURED} of a 2-block {kind},"
        f" teacher {shape.teacher_width}, {shape.batch_size}x{shape.seq_len}, default precision)",
        ["width", "ms per step", "GFLOP", "GFLOP/s", "naive / ours"],
    )
    small = replace(shape, blocks=2)
    cases = [replace(small, student_width=w, student_heads=w // 64) for w in (192, 384, 768)]
    narrow = replace(small, teacher_width=64, student_width=32, student_heads=2, vocab=512)
    cases.append(replace(narrow, batch_size=2, seq_len=32))
    for case in cases:
        own, ratio = beside_naive(kind, case)
        gflop = step_flops(kind, case) / 1e9
        name = str(case.student_width)
        if case.teacher_width != shape.teacher_width:
            name += f" (teacher {case.teacher_width}, {case.batch_size}x{case.seq_len})"
        section.add(name, own, gflop, gflop / (own.median / 1e3), ratio)
    section.notes.append(
        "A block has twelve times its width squared of weights, so the cost is quadratic in the"
        " width; norms, activations and attention are linear, which is why narrow blocks reach"
        " fewer FLOP/s."
    )
    return section


def measure_blocks(kind: str, shape: Shape, repeats: int) -> Section:
    """The whole backbone of students and teachers of several depths."""
    section = Section(
        f"Whole backbone against its number of blocks ({kind}, {shape.teacher_width} to"
        f" {shape.student_width}, {shape.batch_size}x{shape.seq_len}, default precision)",
        ["blocks", "s", "block 0 s", "s per later block", "of the deepest"],
    )
    depths = [max(2, shape.blocks // 4), max(3, shape.blocks // 2), max(4, shape.blocks)]
    cases = [replace(shape, blocks=depth) for depth in depths]
    models = [(new_teacher(case), new_student(kind, case)) for case in cases]
    seconds: list[list[tuple[float, float]]] = [[] for _ in cases]
    for _ in range(repeats):
        for case, (teacher, start), own in zip(cases, models, seconds, strict=True):
            loader = windows_loader(case)
            run = train_our_backbone(teacher, start, loader, epochs=case.epochs, lr=LR)
            own.append((run.backbone_seconds, run.blocks[0]["seconds"]))
    later = [
        spread((whole - first) / (case.blocks - 1) for whole, first in own)
        for case, own in zip(cases, seconds, strict=True)
    ]
    for case, own, each in zip(cases, seconds, later, strict=True):
        whole, first = (spread(column) for column in zip(*own, strict=True))
        section.add(case.blocks, whole, first, each, each.median / later[-1].median)
    section.notes.append(
        "Per later block: what the whole takes beyond block 0, over the blocks after it. What is"
        " not linear is the proof by hash that nothing else moved: each block reads the whole"
        " student, once before and once after."
    )
    return section


def beside_naive(kind: str, shape: Shape) -> tuple[Spread, Spread]:
    """Milliseconds of one block's steady step, and the naive step over ours, charged in full."""
    teacher, start = new_teacher(shape), new_student(kind, shape)
    stitch: Any = starting_stitches(teacher, start)[MEASURED]
    settings = StageSettings(epochs=shape.epochs, lr=LR)
    loader = windows_loader(shape)
    naive = naive_block(teacher, new_student(kind, shape), stitch, MEASURED, loader, settings)
    steady, slow, fast = [], [], []
    for _ in range(2):
        (steps,) = block_steps(teacher, start, shape, only=MEASURED)
        steady += [1e3 * seconds for seconds in steps.steady]
        slow.append(statistics.median(naive.epoch(max_steps=3).step_seconds))
        fast.append(steps.charged)
    return spread(steady), ratios(slow, fast)


def step_flops(kind: str, shape: Shape) -> float:
    """Matmul FLOPs of one step of a block and its stitch."""
    teacher, start = new_teacher(replace(shape, blocks=1)), new_student(kind, shape)
    stitch = starting_stitches(teacher, new_student(kind, replace(shape, blocks=1)))[0]
    return matmul_flops([start.blocks[MEASURED], stitch], shape)
