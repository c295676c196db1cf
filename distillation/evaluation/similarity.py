"""How alike any block of the student is to any block of the teacher: linear CKA.

Kornblith et al., "Similarity of Neural Network Representations Revisited" (2019), with the unbiased
estimate of HSIC that Nguyen et al., "Do Wide and Deep Networks Learn the Same Things?" (2021), take
from Song et al. (2012): few positions of wide states look alike to the biased one. It needs no
stitch and no equal widths. Every channel counts the same, standardised over the positions, as a few
massive channels would decide the figure alone.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cleangpt.blocks import BlockStack
from distillation.evaluation.scoring_windows import Window, WindowBatch

POSITIONS = 512
MIN_POSITIONS = 16
MAX_WINDOWS = 16


def spread_windows(windows: Sequence[Window]) -> list[Window]:
    """At most ``MAX_WINDOWS`` of them, spread over the text."""
    count = min(MAX_WINDOWS, len(windows))
    return [windows[index * len(windows) // count] for index in range(count)]


@torch.no_grad()
def block_similarity(
    student: BlockStack, teacher: BlockStack, batches: Iterable[WindowBatch]
) -> list[list[float]] | None:
    """Return CKA of every student block (rows) with every teacher block (columns).

    Args:
        student: The student.
        teacher: The teacher.
        batches: Windows; ``POSITIONS`` of their scored positions are used, spread evenly.

    Returns:
        None where the batches have fewer than ``MIN_POSITIONS``. A block whose states do not vary
        has NaN.
    """
    parts: list[list[Tensor]] = []
    for batch in batches:
        ids, valid = batch.input_ids, batch.valid.long()
        states = [
            state
            for stack in (student, teacher)
            for state in stack.block_hidden_states(ids.to(stack.device), valid.to(stack.device))[1:]
        ]
        parts.append([state.float().cpu()[batch.scored] for state in states])
    levels = [torch.cat(level) for level in zip(*parts, strict=True)]
    if not levels or len(levels[0]) < MIN_POSITIONS:
        return None
    count = min(POSITIONS, len(levels[0]))
    chosen = torch.arange(count) * len(levels[0]) // count
    grams = torch.stack([_unit_gram(level[chosen]) for level in levels])
    own, theirs = grams[: student.num_blocks], grams[student.num_blocks :]
    return (own @ theirs.T).tolist()


def _unit_gram(states: Float[Tensor, "positions dim"]) -> Float[Tensor, " entries"]:
    """The U-centred Gram matrix as a vector of length 1: their products are CKA."""
    states = states.double()
    states = states - states.mean(0)
    scale = states.square().mean(0).sqrt()
    varies = scale > 1e-12
    states = states[:, varies] / scale[varies]
    gram = states @ states.T
    gram.fill_diagonal_(0)
    count = len(gram)
    rows = gram.sum(1) / (count - 2)
    gram = gram - rows[:, None] - rows[None, :] + rows.sum() / (count - 1)
    gram.fill_diagonal_(0)
    return gram.flatten() / gram.norm()
