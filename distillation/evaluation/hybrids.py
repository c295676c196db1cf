"""The teacher with some of its blocks replaced by the student's: which block costs what.

Possible where both models pass on states of one width. A student block then takes the place of all
the teacher blocks it stands for, alone or together with the student blocks before it. One that
learnt from the same teacher block as the one before it stands for none and is put in after it.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cleangpt.blocks import BlockStack
from distillation.evaluation.results import HybridResult
from distillation.evaluation.scoring_windows import WindowBatch
from distillation.losses.divergence import tempered_kl

MAX_TOKENS = 4096
"""Scored for it: every block is run once per block of the teacher."""


@torch.no_grad()
def can_be_mixed(student: BlockStack, teacher: BlockStack) -> bool:
    """Whether a block of one can read what a block of the other gives."""
    states = [stack.embed(stack.probe_ids().to(stack.device)) for stack in (student, teacher)]
    return bool(states[0].shape == states[1].shape)


@torch.no_grad()
def score_hybrids(
    student: BlockStack,
    teacher: BlockStack,
    layer_map: Sequence[int],
    batches: Iterable[WindowBatch],
) -> list[HybridResult]:
    """Return what each student block costs inside the teacher, in nats of KL per token.

    Args:
        student: Whose blocks are put in.
        teacher: Into which they are put; both are left as they were.
        layer_map: The last of the teacher blocks that each student block stands for.
        batches: What is scored; at most ``MAX_TOKENS`` tokens of it.
    """
    alone, chained = [0.0] * len(layer_map), [0.0] * len(layer_map)
    count = 0
    for batch in batches:
        ids = batch.input_ids.to(teacher.device)
        mask = batch.valid.long().to(teacher.device)
        states = teacher.block_states(ids, mask)
        scored = batch.scored.to(teacher.device)
        target = teacher.logits_of(states[-1], ids, mask)[scored].float()

        def divergence(
            state: Tensor,
            block: int,
            ids: Tensor = ids,
            mask: Tensor = mask,
            scored: Tensor = scored,
            target: Tensor = target,
        ) -> float:
            for index in range(layer_map[block] + 1, teacher.num_blocks):
                state = teacher.advance(index, state, ids, mask)
            logits = teacher.logits_of(state, ids, mask)[scored].float()
            return float(tempered_kl(logits, target, temperature=1.0)) * len(target)

        chain = states[0]
        for block in range(len(layer_map)):
            entering = states[layer_map[block - 1] + 1 if block else 0]
            alone[block] += divergence(student.advance(block, entering, ids, mask), block)
            chain = student.advance(block, chain, ids, mask)
            chained[block] += divergence(chain, block)
        count += len(target)
        if count >= MAX_TOKENS:
            break
    return [
        HybridResult(student_block=block, kl_alone=one / count, kl_chained=all_before / count)
        for block, (one, all_before) in enumerate(zip(alone, chained, strict=True))
    ]
