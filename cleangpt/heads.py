"""What stands between a causal LM's last block and its logits."""

import torch

from cleangpt.blocks import BlockStack
from cleangpt.runtime.module_state import preserved_modes


def head_is_linear(stack: BlockStack) -> bool:
    """Whether the logits are ``lm_head(final_norm(hidden))`` and nothing more.

    Some families also scale them or cap them softly (Gemma 2, Cohere, Granite). Found by running
    both on two tokens: equal operations give equal bits.
    """
    ids = stack.probe_ids()
    with torch.no_grad(), preserved_modes(stack.model):
        stack.model.eval()
        state = stack.state_entering(stack.num_blocks, ids)
        logits = stack.logits_of(state, ids)
        return torch.equal(logits, stack.lm_head(stack.head_features(state)))
