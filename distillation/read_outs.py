"""Linear read-outs from a finished student's hidden states to the teacher's."""

from collections.abc import Iterable

import torch

from cleangpt.blocks import BlockStack
from cleangpt.runtime.module_state import preserved_modes
from distillation.batch import Batch, in_parts
from distillation.least_squares import LeastSquares
from distillation.stages import set_stitch
from stitching_layers import StitchingLayers

READ_OUT_TOKENS = 16_384
"""How many positions they are fitted on."""


@torch.no_grad()
def fit_read_outs(
    teacher: BlockStack,
    student: BlockStack,
    like: StitchingLayers,
    batches: Iterable[Batch],
    max_tokens: int,
) -> StitchingLayers:
    """Return the least-squares stitches from all student blocks to raw teacher states.

    Args:
        teacher: The model whose states are predicted.
        student: The model they are predicted from.
        like: Stitches of the same shape and layer map; they are not changed.
        batches: Data to fit on.
        max_tokens: Stop after this many valid positions.
    """
    sums = [LeastSquares() for _ in like.layer_map]
    with preserved_modes(teacher.model, student.model):
        teacher.model.eval()
        student.model.eval()
        for batch in in_parts(batches):
            targets = teacher.block_hidden_states(
                batch.input_ids, batch.mask, stop_after=max(like.layer_map)
            )
            states = student.block_hidden_states(batch.input_ids, batch.mask)
            for own, state, block in zip(sums, states[1:], like.layer_map, strict=True):
                own.add(batch.valid(state), batch.valid(targets[block + 1]))
            if sums[0].count >= max_tokens:
                break
    fitted = StitchingLayers(like.layer_map, like.student_dim, like.teacher_dim, like.bias)
    for stitch, own in zip(fitted, sums, strict=True):
        set_stitch(stitch, own)  # type: ignore[arg-type]
    return fitted
