"""What a teacher loses without each of its blocks: which ones a shallower student is made of.

A few blocks do what no other can, above all the first and the last ones; most others hardly matter
(ShortGPT, Men et al. 2024, arXiv:2403.03853; by the loss itself as here: SLEB, Song et al. 2024,
arXiv:2402.09025).
"""

from collections.abc import Iterable
from typing import Any

import torch

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError
from cleangpt.runtime.module_state import preserved_modes
from distillation.batch import as_batch
from distillation.losses.divergence import tempered_kl

MEASURED_TOKENS = 512


@torch.no_grad()
def block_costs(
    teacher: BlockStack, batches: Iterable[Any], max_tokens: int = MEASURED_TOKENS
) -> list[float]:
    """The divergence of the teacher's predictions without a block, for each of its blocks.

    Half of its blocks run once per block, so this takes as long as ``num_blocks / 2`` passes over
    the tokens.

    Args:
        teacher: Left as it was.
        batches: As for training; as many rows as are needed are taken.
        max_tokens: Stop after this many valid positions; a window is never cut.

    Returns:
        KL(teacher || teacher without the block), in nats per token, by block.

    Raises:
        InputError: If there is no valid position.
    """
    costs, count = [0.0] * teacher.num_blocks, 0
    with preserved_modes(teacher.model):
        teacher.model.eval()
        for raw in batches:
            batch = as_batch(raw, teacher.device)
            rows = max(1, (max_tokens - count) // batch.input_ids.shape[1])
            ids = batch.input_ids[:rows]
            mask = None if batch.mask is None else batch.mask[:rows]
            valid = batch.attention_mask[:rows]
            if not valid.any():
                continue
            states = teacher.block_states(ids, mask)
            target = teacher.logits_of(states[-1], ids, mask)[valid].float()
            for block in range(teacher.num_blocks):
                state = states[block]
                for later in range(block + 1, teacher.num_blocks):
                    state = teacher.advance(later, state, ids, mask)
                without = teacher.logits_of(state, ids, mask)[valid].float()
                costs[block] += float(tempered_kl(without, target, temperature=1.0)) * len(target)
            count += len(target)
            if count >= max_tokens:
                break
    if not count:
        raise InputError(
            "There is no valid position to measure the teacher's blocks on.",
            "Give batches with text, or name the blocks: --layer_map 1,3,5.",
        )
    return [cost / count for cost in costs]
