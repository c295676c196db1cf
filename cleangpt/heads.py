"""What stands between a causal LM's last block and its logits."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cleangpt.blocks import BlockStack
from cleangpt.runtime.module_state import preserved_modes


def head_is_tied(stack: BlockStack) -> bool:
    """Whether the head is the embedding matrix itself."""
    head, embeddings = stack.lm_head, stack.model.get_input_embeddings()
    return head_factors(head) is None and head.weight is embeddings.weight


def head_factors(head: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """The two linear maps, first and second, of a head of low rank; None if the head is one map."""
    down, up = getattr(head, "down", None), getattr(head, "up", None)
    if isinstance(down, nn.Linear) and isinstance(up, nn.Linear):
        return down, up
    return None


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
        head, features = stack.lm_head, stack.head_features(state)
        # The weights themselves are used later, so a wrapped head (an adapter's) is none.
        product = functional.linear(features, head.weight, getattr(head, "bias", None))
        if head_factors(head) is None:
            return torch.equal(logits, product)
        # Two products in a row round otherwise than one; a cap or a scale after them still shows.
        return torch.equal(logits, head(features)) and _equal_but_for_rounding(logits, product)


def _equal_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    scale = float(one.abs().max())
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5 * scale)


def logits_at(
    stack: BlockStack, state: Float[Tensor, "positions d_state"]
) -> Float[Tensor, "positions vocab"]:
    """The model's own path from its last block's raw output to logits, caps and scales included.

    Nothing after the blocks looks at other positions, so each is a sequence of its own here, and
    only as many logits exist as positions are asked for.
    """
    alone = state.unsqueeze(1)
    ids = torch.zeros(alone.shape[:2], dtype=torch.long, device=state.device)
    return stack.logits_of(alone, ids)[:, 0]
