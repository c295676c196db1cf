"""GPT-2's activation in its fused form: the same function, for as long as asked."""

import pytest
import torch
from torch import nn
from transformers.activations import NewGELUActivation

from cleangpt.blocks import BlockStack
from cleangpt.runtime.fused_gelu import fused_gelu
from tests.builders import tiny_teacher


def eager_ones(model: nn.Module) -> int:
    return sum(type(module) is NewGELUActivation for module in model.modules())


def test_same_states_up_to_rounding_and_everything_is_put_back() -> None:
    model = tiny_teacher().eval()
    count = eager_ones(model)
    assert count == BlockStack(model).num_blocks
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = BlockStack(model).logits(ids)
        with fused_gelu(model):
            assert eager_ones(model) == 0
            inside = BlockStack(model).logits(ids)
        after = BlockStack(model).logits(ids)
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=1e-6)
    assert torch.equal(after, before)
    assert eager_ones(model) == count


def test_an_exception_puts_everything_back_too() -> None:
    model = tiny_teacher()
    count = eager_ones(model)
    with pytest.raises(KeyError), fused_gelu(model):
        raise KeyError
    assert eager_ones(model) == count
