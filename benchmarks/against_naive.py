"""Backbone, head phase and whole job against the obvious loops, at the same number of epochs.

Ours is always the real trainer, charged with everything: filling the store, moving both models on,
loader, optimizers, hashes, checks and files. The naive loop's cost of a step hardly depends on the
block, and its whole backbone takes very long, so it is timed at three depths, over all its epochs,
and multiplied; block 0, whose optimizer also moves the embeddings, stands for itself only.
``full=True`` runs all of it instead. Turns alternate: one whole run of ours, then one epoch of each
naive stage, and so on.
"""

import copy
import statistics
from typing import Any

import torch

from benchmarks.cases import (
    Shape,
    before_block,
    before_head,
    new_student,
    new_teacher,
    starting_stitches,
    windows_loader,
)
from benchmarks.naive import Epoch, NaiveLoop, naive_block, naive_end_to_end, naive_head
from benchmarks.ours import PRECISIONS, OurRun, train_our_backbone, train_ours
from benchmarks.products import head_seconds
from benchmarks.report import Section
from benchmarks.spread import number, ratios, relative_difference, spread
from distillation.config import StageSettings

LR, HEAD_LR = 1e-3, 1e-4
Runs = dict[str, list[OurRun]]


def measure_backbone(kinds: tuple[str, ...], shape: Shape, *, full: bool = False) -> Section:
    """All blocks of each student."""
    section = Section(
        f"Whole backbone, {shape.epochs} epochs per block ({shape})",
        [
            *("student", "precision", "naive s", "ours s", "naive / ours"),
            *("without hashes and files", "ours tokens/s"),
        ],
    )
    teacher = new_teacher(shape)
    for index, kind in enumerate(kinds):
        start = new_student(kind, shape)
        # The first kind has all turns; for the others two show the spread.
        turns = shape.epochs if index == 0 else min(2, shape.epochs)
        ours, naive = backbone_turns(teacher, start, shape, turns)
        if index == 0:
            section.notes.append(run_to_run_noise(teacher, start, shape, ours))
        if full:
            seconds, losses = whole_naive_backbone(teacher, start, shape)
            section.notes.append(compare_all_losses(kind, losses, ours))
        else:
            seconds = naive_backbone_seconds(naive, shape)[:turns]
            section.notes.append(compare_losses(kind, naive, ours))
        for precision, runs in ours.items():
            whole = [run.backbone_seconds for run in runs]
            loops = [sum(row["seconds"] for row in run.blocks) for run in runs]
            pairs = seconds * len(whole) if full else seconds
            section.add(
                kind,
                precision,
                spread(seconds),
                spread(whole),
                ratios(pairs, whole),
                ratios(pairs, loops),
                spread(shape.blocks * shape.steps * shape.tokens_per_batch / own for own in whole),
            )
    how = "run whole" if full else f"timed at blocks {depths(shape)} and multiplied"
    section.notes.append(
        f"The naive loop was {how}: {shape.steps * shape.blocks} steps of"
        f" {shape.tokens_per_batch} tokens. What ours spends outside its steps, such as proving by"
        " hash that nothing else moved, is fixed per block, so with more data the ratio tends to"
        " the last column."
    )
    return section


def run_to_run_noise(teacher: Any, start: Any, shape: Shape, ours: Runs) -> str:
    """Say how much another seed changes the final losses, and how much the default precision."""
    other = train_our_backbone(
        *(teacher, start, windows_loader(shape)),
        epochs=shape.epochs,
        lr=LR,
        precision="fp32",
        seed=1,
    )
    exact, default = (ours[precision][0] for precision in PRECISIONS)
    return (
        "Final losses of all blocks, against ours in fp32: another seed (stitches and order of the"
        f" data) is at most {farthest_loss(exact, other):.1e} apart, the default precision at most"
        f" {farthest_loss(exact, default):.1e}."
    )


def farthest_loss(one: OurRun, other: OurRun) -> float:
    """The largest relative difference of a block's final loss."""
    return max(
        relative_difference(a["last_loss"], b["last_loss"])
        for a, b in zip(one.blocks, other.blocks, strict=True)
    )


def depths(shape: Shape) -> list[int]:
    """The blocks at which the naive loop is timed: first, middle, last."""
    return sorted({0, (shape.blocks - 1) // 2, shape.blocks - 1})


def backbone_turns(
    teacher: Any, start: Any, shape: Shape, turns: int
) -> tuple[Runs, dict[int, list[Epoch]]]:
    """Our whole backbone, once per precision, in turns with one epoch of each naive stage.

    Ours runs ``turns`` times; the naive stages always end all their epochs, for their losses.
    """
    loader = windows_loader(shape)
    ours: Runs = {precision: [] for precision in PRECISIONS}
    loops: dict[int, NaiveLoop] = {}
    naive: dict[int, list[Epoch]] = {block: [] for block in depths(shape)}
    for turn in range(shape.epochs):
        for precision, runs in ours.items() if turn < turns else ():
            run = train_our_backbone(
                teacher, start, loader, epochs=shape.epochs, lr=LR, precision=precision
            )
            runs.append(run)
        # Where the naive loop would be after the blocks before: ours gets the same weights.
        trained = ours["fp32"][0].student
        for block, epochs in naive.items():
            if block not in loops:
                student = before_block(start, trained, block)
                stitch: Any = starting_stitches(teacher, start)[block]
                settings = StageSettings(epochs=shape.epochs, lr=LR)
                loops[block] = naive_block(teacher, student, stitch, block, loader, settings)
            epochs.append(loops[block].epoch())
    return ours, naive


def naive_backbone_seconds(naive: dict[int, list[Epoch]], shape: Shape) -> list[float]:
    """What the whole naive backbone takes by the steps of each turn."""
    found = []
    for turn in range(shape.epochs):
        step = {b: statistics.median(epochs[turn].step_seconds) for b, epochs in naive.items()}
        first = step.pop(0)
        later = statistics.mean(step.values()) if step else 0.0
        found.append(shape.steps * (first + (shape.blocks - 1) * later))
    return found


def whole_naive_backbone(teacher: Any, start: Any, shape: Shape) -> tuple[list[float], list[float]]:
    """Run all of the naive backbone; return its seconds and each block's last loss."""
    student, loader = copy.deepcopy(start), windows_loader(shape)
    seconds, losses = 0.0, []
    for block, stitch in enumerate(starting_stitches(teacher, start)):
        settings = StageSettings(epochs=shape.epochs, lr=LR)
        layer: Any = stitch
        epochs = naive_block(teacher, student, layer, block, loader, settings).run()
        seconds += sum(sum(epoch.step_seconds) for epoch in epochs)
        losses.append(epochs[-1].loss)
    return [seconds], losses


def compare_losses(kind: str, naive: dict[int, list[Epoch]], ours: Runs) -> str:
    """Say what the final losses were, at the blocks where the naive loop ran."""
    parts = []
    for block, epochs in naive.items():
        exact, default = (ours[p][0].blocks[block]["last_loss"] for p in PRECISIONS)
        parts.append(
            f"block {block}: naive {epochs[-1].loss:.7g}, ours fp32 {exact:.7g}"
            f" ({relative_difference(epochs[-1].loss, exact):.0e} apart), default {default:.7g}"
            f" ({relative_difference(epochs[-1].loss, default):.0e})"
        )
    return f"{kind}, mean loss of the last epoch: {'; '.join(parts)}."


def compare_all_losses(kind: str, losses: list[float], ours: Runs) -> str:
    """Say how far apart the final losses of all blocks were."""
    worst = {
        precision: max(
            relative_difference(loss, row["last_loss"])
            for loss, row in zip(losses, runs[0].blocks, strict=True)
        )
        for precision, runs in ours.items()
    }
    apart = ", ".join(f"{precision} {value:.0e}" for precision, value in worst.items())
    return (
        f"{kind}: largest difference of a block's final loss from the naive one, relative: {apart}."
    )


def measure_head(kind: str, shape: Shape) -> Section:
    """The head phase as it follows a backbone, whose last states are at hand."""
    section = Section(
        f"Head phase, {shape.epochs} epochs ({shape})",
        [
            *("student", "precision", "naive s", "ours s", "naive / ours"),
            *("its products alone s", "naive / products: the bound"),
        ],
    )
    teacher, start, loader = new_teacher(shape), new_student(kind, shape), windows_loader(shape)
    # One epoch of the last block brings the store to where a real run has it.
    backbone_epochs = [0] * (shape.blocks - 1) + [1]
    ours: Runs = {precision: [] for precision in PRECISIONS}
    bare: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    naive: list[Epoch] = []
    loop: NaiveLoop | None = None
    for _ in range(shape.epochs):
        exact = head_seconds(shape, torch.float32)
        bare["fp32"].append(shape.steps * exact)
        bare["auto"].append(shape.steps * min(exact, head_seconds(shape, torch.bfloat16)))
        for precision, runs in ours.items():
            run = train_ours(
                *(teacher, start, loader),
                epochs=backbone_epochs,
                lr=LR,
                head_epochs=shape.epochs,
                head_lr=HEAD_LR,
                precision=precision,
            )
            runs.append(run)
        if loop is None:
            student = before_head(start, ours["fp32"][0].student)
            settings = StageSettings(epochs=shape.epochs, lr=HEAD_LR)
            loop = naive_head(teacher, student, loader, settings)
        naive.append(loop.epoch())
    seconds = [shape.steps * statistics.median(epoch.step_seconds) for epoch in naive]
    for precision, runs in ours.items():
        own = [run.head_seconds for run in runs]
        section.add(
            *(kind, precision, spread(seconds), spread(own), ratios(seconds, own)),
            *(spread(bare[precision]), ratios(seconds, bare[precision])),
        )
    section.notes.append(compare_head_losses(naive[-1].loss, ours))
    section.notes.append(
        "Products alone: both models' logits and the gradient of the head by torch.mm, with nothing"
        " else (auto: in the faster of the two types)."
    )
    return section


def compare_head_losses(naive: float, ours: Runs) -> str:
    """Say what the final losses of the head phase were."""
    found = {p: runs[0].head["last_loss"] for p, runs in ours.items() if runs[0].head is not None}
    parts = [
        f"ours {p} {loss:.7g} ({relative_difference(naive, loss):.0e} apart)"
        for p, loss in found.items()
    ]
    return f"Mean loss of the last epoch: naive {naive:.7g}, {', '.join(parts)}."


def measure_end_to_end(kind: str, shape: Shape) -> Section:
    """Blocks and head with ours, against logit distillation of the whole student."""
    section = Section(
        f"Whole job against end-to-end logit distillation, {shape.epochs} epochs each ({shape})",
        ["student", "precision", "end to end s", "ours s", "end to end / ours"],
    )
    teacher, start, loader = new_teacher(shape), new_student(kind, shape), windows_loader(shape)
    student = copy.deepcopy(start)
    settings = StageSettings(epochs=shape.epochs, lr=LR)
    loop = naive_end_to_end(teacher, student, loader, settings)
    ours: Runs = {precision: [] for precision in PRECISIONS}
    seconds = []
    for _ in range(min(2, shape.epochs)):
        for precision, runs in ours.items():
            run = train_ours(
                *(teacher, start, loader),
                epochs=shape.epochs,
                lr=LR,
                head_epochs=shape.epochs,
                head_lr=HEAD_LR,
                precision=precision,
            )
            runs.append(run)
        seconds.append(shape.steps * statistics.median(loop.epoch().step_seconds))
    for precision, runs in ours.items():
        own = [run.total_seconds for run in runs]
        section.add(kind, precision, spread(seconds), spread(own), ratios(seconds, own))
    section.notes.append(
        f"Ours takes {shape.blocks + 1} stages of {shape.epochs} epochs; end to end, one stage."
        f" Per step of {shape.tokens_per_batch} tokens end to end takes"
        f" {number(statistics.median(seconds) / shape.steps)} s."
    )
    return section
