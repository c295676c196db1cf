"""Choose the layer map and the stitches, then measure every student block.

``hidden_states.py`` has the sums and the least-squares fit; this file decides which stitch is used
and says so.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError
from distillation.evaluation.hidden_states import (
    BlockPairs,
    Stitch,
    block_pairs,
    fit_stitches,
    measure_blocks,
)
from distillation.evaluation.hybrids import can_be_mixed, score_hybrids
from distillation.evaluation.results import HiddenResult
from distillation.evaluation.scoring_windows import Window, plan_windows, window_batches
from distillation.evaluation.similarity import block_similarity, spread_windows
from distillation.layer_map import uniform_layer_map
from stitching_layers import StitchingLayers

logger = logging.getLogger(__name__)


def compare_hidden_states(
    student: BlockStack,
    teacher: BlockStack,
    token_ids: Sequence[int],
    *,
    seq_len: int,
    batch_size: int,
    stitches: StitchingLayers | None,
    layer_map: Sequence[int] | None,
    notes: list[str],
) -> HiddenResult | None:
    """Return the error of every student block, or None (with a note) if none can be measured."""
    chosen_map = _choose_layer_map(student, teacher, stitches, layer_map, notes)
    windows = plan_windows(len(token_ids), seq_len, seq_len)
    result = _compare(student, teacher, token_ids, windows, batch_size, stitches, chosen_map, notes)
    if result is None:
        return None
    chosen = window_batches(token_ids, spread_windows(windows), batch_size)
    result["similarity"] = block_similarity(student, teacher, chosen)
    if can_be_mixed(student, teacher):
        batches = window_batches(token_ids, windows, batch_size)
        result["hybrids"] = score_hybrids(student, teacher, chosen_map, batches)
    return result


def _compare(
    student: BlockStack,
    teacher: BlockStack,
    token_ids: Sequence[int],
    windows: Sequence[Window],
    batch_size: int,
    stitches: StitchingLayers | None,
    chosen_map: Sequence[int],
    notes: list[str],
) -> HiddenResult | None:
    """The error of every block through the stitches there are, or fitted ones."""

    def pairs(chosen: Sequence[Window]) -> Iterator[BlockPairs]:
        for batch in window_batches(token_ids, chosen, batch_size):
            yield block_pairs(student, teacher, chosen_map, batch)

    if stitches is not None:
        _check_stitches(stitches, student, teacher)
        saved = [_on_cpu(stitches, index) for index in range(student.num_blocks)]
        return _measure("saved", pairs(windows), chosen_map, saved)
    if student.hidden_size == teacher.hidden_size:
        same: list[Stitch] = [lambda state: state] * student.num_blocks
        return _measure("identity", pairs(windows), chosen_map, same)
    if len(windows) < 2:
        notes.append(
            "Hidden states not compared: no stitching layers are saved, and one window of text is "
            "too little to fit and to measure them."
        )
        return None
    notes.append(
        f"No stitching layers are saved and widths differ ({student.hidden_size} and "
        f"{teacher.hidden_size}): hidden states are compared through least-squares stitches, "
        "fitted on every other window and measured on the rest."
    )
    fitted = fit_stitches(pairs(windows[0::2]), student.num_blocks)
    return _measure("least_squares", pairs(windows[1::2]), chosen_map, fitted)


def _measure(
    kind: Literal["saved", "identity", "least_squares"],
    pairs: Iterable[BlockPairs],
    layer_map: Sequence[int],
    stitches: Sequence[Stitch],
) -> HiddenResult:
    blocks, num_positions = measure_blocks(pairs, layer_map, stitches)
    return HiddenResult(
        stitch=kind, num_positions=num_positions, blocks=blocks, hybrids=[], similarity=None
    )


def _choose_layer_map(
    student: BlockStack,
    teacher: BlockStack,
    stitches: StitchingLayers | None,
    layer_map: Sequence[int] | None,
    notes: list[str],
) -> tuple[int, ...]:
    """The given map, else the saved one, else the training default."""
    chosen = tuple(layer_map) if layer_map is not None else None
    if chosen is None and stitches is not None:
        chosen = tuple(stitches.layer_map)
    if chosen is None:
        chosen = uniform_layer_map(student.num_blocks, teacher.num_blocks)
        if student.num_blocks != teacher.num_blocks:
            notes.append(
                "No layer map that fits this teacher is saved: the student's "
                f"{student.num_blocks} blocks are compared with the teacher's blocks "
                f"{list(chosen)}, spread evenly."
            )
    if len(chosen) != student.num_blocks or not all(0 <= b < teacher.num_blocks for b in chosen):
        raise InputError(
            f"The layer map {list(chosen)} does not fit a student of {student.num_blocks} blocks "
            f"and a teacher of {teacher.num_blocks}.",
            "Evaluate against the teacher the student was distilled from (--teacher_model_name).",
        )
    return chosen


def _check_stitches(stitches: StitchingLayers, student: BlockStack, teacher: BlockStack) -> None:
    """Refuse stitches of another run."""
    if (stitches.student_dim, stitches.teacher_dim) != (student.hidden_size, teacher.hidden_size):
        raise InputError(
            f"The saved stitching layers lead from width {stitches.student_dim} to "
            f"{stitches.teacher_dim}, but the student has width {student.hidden_size} and the "
            f"teacher {teacher.hidden_size}.",
            "Evaluate against the teacher the student was distilled from (--teacher_model_name).",
        )


def _on_cpu(stitches: StitchingLayers, index: int) -> Stitch:
    """A saved stitch as a function of states on the CPU, in fp32."""
    module = stitches[index]
    parameter = next(iter(module.parameters()), None)

    @torch.no_grad()
    def apply(state: Tensor) -> Tensor:
        if parameter is None:
            return state
        return module(state.to(parameter.device, parameter.dtype)).float().cpu()

    return apply
