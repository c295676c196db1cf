"""The invariants of BlockStack over HuggingFace families and our students."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.builders import FAMILIES, STUDENTS, batches, padded, tiny_student, tiny_teacher

ALL = [*FAMILIES, *STUDENTS]


def build(name: str) -> tuple[Any, Any]:
    from cleangpt.blocks import BlockStack

    model = tiny_student(name) if name in STUDENTS else tiny_teacher(name)
    return model.eval(), BlockStack(model)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def batch() -> dict[str, Any]:
    return batches(1)[0]


@pytest.mark.parametrize("name", ALL)
def test_last_state_through_norm_and_head_gives_the_logits(name: str, batch: Any) -> None:
    model, stack = build(name)
    with torch.no_grad():
        states = stack.block_states(**batch)
        logits = stack.lm_head(stack.head_features(states[-1]))
        torch.testing.assert_close(logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stack.logits(**batch), model(**batch).logits)
    assert len(states) == stack.num_blocks + 1


@pytest.mark.parametrize("name", ALL)
def test_states_are_raw_and_early_stop_agrees_with_the_full_pass(name: str, batch: Any) -> None:
    _, stack = build(name)
    with torch.no_grad():
        states = stack.block_states(**batch)
        for index in range(stack.num_blocks + 1):
            assert torch.equal(stack.state_entering(index, **batch), states[index])
        assert torch.equal(stack.embed(**batch), states[0])
        stopped = stack.block_states(**batch, stop_after=1)
    assert len(stopped) == 3
    assert all(torch.equal(a, b) for a, b in zip(stopped, states, strict=False))


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_advancing_one_block_equals_the_full_pass(name: str, side: str | None, batch: Any) -> None:
    _, stack = build(name)
    batch = padded(batch, 3, side) if side else batch
    with torch.no_grad():
        states = stack.block_states(**batch)
        for index in range(stack.num_blocks):
            advanced = stack.advance(index, states[index], **batch)
            assert torch.equal(advanced, states[index + 1])


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_behind(name: str, batch: Any) -> None:
    model, stack = build(name)
    stack.final_norm  # noqa: B018 - found lazily, with hooks
    with torch.no_grad():
        before, hooks = model(**batch).logits, hooks_of(model)
        states = stack.block_states(**batch, stop_after=0)
        stack.advance(1, states[1], **batch)
        assert torch.equal(model(**batch).logits, before)
    assert hooks_of(model) == hooks
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ALL)
def test_an_exception_leaves_the_model_clean(name: str, batch: Any) -> None:
    model, stack = build(name)
    hooks = hooks_of(model)
    with torch.no_grad():
        before = model(**batch).logits
        state = stack.embed(**batch)
        with pytest.raises(Exception):  # noqa: B017, PT011 - each family raises its own
            stack.advance(1, state[..., :-1], **batch)
        assert torch.equal(model(**batch).logits, before)
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bloom", *STUDENTS])
def test_left_and_right_padding_agree(name: str, batch: Any) -> None:
    _, stack = build(name)
    with torch.no_grad():
        plain = stack.block_hidden_states(**batch)[-1]
        left = stack.block_hidden_states(**padded(batch, 4, "left"))[-1][:, 4:]
        right = stack.block_hidden_states(**padded(batch, 4, "right"))[-1][:, :-4]
    torch.testing.assert_close(left, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_only_the_block_that_advances(name: str, batch: Any) -> None:
    model, stack = build(name)
    with torch.no_grad():
        states = stack.block_states(**batch)
    stack.advance(1, states[1], **batch).square().mean().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    own = {id(p) for p in stack.block(1).parameters()}
    assert with_gradient == {n for n, p in model.named_parameters() if id(p) in own}


def test_blocks_that_cannot_be_found_are_explained() -> None:
    from cleangpt.blocks import BlockStack

    model = tiny_teacher("gpt2")
    model.config.n_layer = 5
    with pytest.raises(
        ValueError, match=r"0 lists of 5 blocks.*GPT2LMHeadModel.*transformer\.h"
    ) as e:
        BlockStack(model)
    assert "blocks_path" in str(e.value)
    with pytest.raises(ValueError, match="blocks_path='nowhere' is not a ModuleList"):
        BlockStack(model, blocks_path="nowhere")
    assert BlockStack(model, blocks_path="transformer.h").num_blocks == 3


def test_two_candidates_are_refused_and_named() -> None:
    from cleangpt.blocks import BlockStack

    model = tiny_teacher("gpt2")
    model.twin = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(ValueError, match=r"2 lists of 3 blocks.*twin"):
        BlockStack(model)
