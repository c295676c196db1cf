"""A teacher's weights in one form: computing with them gives what the teacher's own parts give."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from cleangpt.blocks import BlockStack
from distillation.teacher_weights import LinearMap, read_block
from tests.builders import LLAMA_LIKE, VOCAB, WIDTH, tiny_teacher

FIELDS: dict[str, dict[str, Any]] = {
    "qwen2": LLAMA_LIKE,
    "gemma": {**LLAMA_LIKE, "head_dim": 8},
    "granite": {**LLAMA_LIKE, "attention_multiplier": 0.2, "residual_multiplier": 0.3},
    "starcoder2": {**LLAMA_LIKE, "hidden_act": "gelu_pytorch_tanh"},
}
ROTARY = ("llama", "mistral", "qwen2", "gemma", "granite", "starcoder2", "gpt_neox")


def noisy_teacher(family: str, **changes: Any) -> Any:
    """A teacher whose gains and biases are no longer ones and zeros."""
    teacher = tiny_teacher(family, config_fields=FIELDS.get(family), **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return teacher


def plain_norm(states: Tensor, centred: bool) -> Tensor:
    if centred:
        return F.layer_norm(states, (WIDTH,))
    return F.rms_norm(states, (WIDTH,), eps=1e-6)


def applied(linear: LinearMap, states: Tensor) -> Tensor:
    return F.linear(states, linear.weight, linear.bias)


@torch.no_grad()
def seen_in_block(teacher: Any, index: int, ids: Tensor) -> dict[str, Tensor]:
    """What enters the block, and what its two parts return."""
    block = BlockStack(teacher).block(index)
    kept: dict[str, Tensor] = {}
    inner = first(block, ("attn", "self_attn", "attention", "self_attention"))
    parts = {
        "attention": first(inner, ("c_proj", "o_proj", "out_proj", "dense")),
        "mlp": first(block, ("mlp", "fc2")),
    }
    hooks = [
        block.register_forward_pre_hook(
            lambda m, args, kwargs: kept.update(state=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    ]
    for part, module in parts.items():
        hooks.append(
            module.register_forward_hook(lambda m, args, out, part=part: kept.update({part: out}))
        )
    # One position for all: rotary scores then see contents alone. Without a mask, positions that
    # start again would be taken for packed sequences.
    positions = {"position_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    teacher(input_ids=ids, use_cache=False, **(positions if is_rotary(teacher) else {}))
    for hook in hooks:
        hook.remove()
    return kept


def first(module: Any, names: tuple[str, ...]) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def is_rotary(teacher: Any) -> bool:
    return teacher.config.model_type in (*ROTARY, "qwen3")


def attention_of(weights: Any, normed: Tensor) -> Tensor:
    heads = weights.num_heads
    query, key, value = (
        applied(part, normed).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in (weights.query, weights.key, weights.value)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return applied(weights.out, mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("family", "length"), [*((f, 6) for f in ("gpt2", "opt", *ROTARY)), ("bloom", 1), ("qwen3", 1)]
)
def test_attention_in_the_common_form_is_the_teachers(family: str, length: int) -> None:
    """At one position in families whose scores are not of this form."""
    teacher = noisy_teacher(family)
    ids = torch.randint(1, VOCAB, (2, length), generator=torch.Generator().manual_seed(4))
    seen = seen_in_block(teacher, 1, ids)
    weights = read_block(BlockStack(teacher), 1)
    assert weights.attention is not None
    centred = not any("subtract the mean" in line for line in weights.missing)
    own = attention_of(weights.attention, plain_norm(seen["state"], centred))
    multiplier = getattr(teacher.config, "residual_multiplier", 1.0)
    torch.testing.assert_close(own, seen["attention"] * multiplier, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt", "starcoder2"])
def test_mlp_in_the_common_form_is_the_teachers(family: str) -> None:
    teacher = noisy_teacher(family)
    ids = torch.arange(1, 13).view(2, 6)
    seen = seen_in_block(teacher, 1, ids)
    weights = read_block(BlockStack(teacher), 1).mlp
    assert weights is not None
    assert weights.activation is not None
    between = plain_norm(seen["state"] + seen["attention"], centred=True)
    inner = ACT2FN[weights.activation](applied(weights.up, between))
    own = applied(weights.down, inner).reshape(seen["mlp"].shape)  # OPT runs it on flat positions
    torch.testing.assert_close(own, seen["mlp"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama", "MLP: the teacher's is gated"),
        ("llama", "norms: the teacher's do not subtract the mean"),
        ("qwen3", "norms of queries and keys: taken as constants"),
        ("gpt_neox", "the order: the teacher's MLP reads what its attention reads"),
        ("gemma3", "blocks: the teacher's norms stand after their parts"),
    ],
)
def test_what_has_another_form_is_said(family: str, said: str) -> None:
    assert said in read_block(BlockStack(tiny_teacher(family)), 0).missing


def test_a_teacher_that_normalises_after_its_parts_gives_no_block() -> None:
    weights = read_block(BlockStack(tiny_teacher("opt", do_layer_norm_before=False)), 0)
    assert weights.attention is None
    assert weights.mlp is None


def test_an_unknown_layout_is_said_and_not_guessed() -> None:
    teacher = tiny_teacher("gpt_bigcode", config_fields={**GPT_BIGCODE, "multi_query": False})
    weights = read_block(BlockStack(teacher), 0)
    assert weights.attention is None
    assert "attention: its layout is not known here" in weights.missing
    assert weights.mlp is not None


GPT_BIGCODE = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}


def test_normed_queries_are_near_their_linear_form() -> None:
    """On normal inputs, the mean square that stands for each one's own is off by little."""
    teacher = noisy_teacher("qwen3")
    block = BlockStack(teacher).block(0)
    weights = read_block(BlockStack(teacher), 0).attention
    assert weights is not None
    normed = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = block.self_attn.q_proj(normed * block.input_layernorm.weight)
        theirs = block.self_attn.q_norm(theirs.unflatten(-1, (4, 8))).flatten(-2)
    error = (applied(weights.query, normed) - theirs).square().mean() / theirs.square().mean()
    assert error < 0.15
