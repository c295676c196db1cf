"""A Vanilla student as transformers' own GPT-2, with equal logits.

A Vanilla block is GPT-2's: LayerNorm, attention, LayerNorm, an MLP of four times the width, each
added to its input. What differs is how the numbers are laid out: GPT-2 keeps queries, keys and
values in one matrix, stores matrices transposed, and always has biases, which are zero here where
the student has none. A value or output map of whole heads, M (x) I, is written out as the matrix it
is, and a head of low rank as the product of its two.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from cleangpt.errors import UsageError
from model import VanillaTransformerModelDistillation
from model.layers import KroneckerMap, LowRankHead

_REASONS = {
    "Factored": "a Factored block carries two streams, and no class of transformers does",
    "SASP": "a SASP block has no skip connections and shaped attention, and no class of"
    " transformers does",
}


def to_gpt2(student: Any) -> GPT2LMHeadModel:
    """Return GPT-2 with the student's weights, in eval mode; a GPT-2 is returned as it is.

    Raises:
        UsageError: If GPT-2 cannot be what the student is, with the reason.
    """
    if type(student) is GPT2LMHeadModel:
        return student.eval()
    _check_has_equal(student)
    config = student.config
    tied = student.lm_head.weight is student.wte.weight
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_inner=4 * config.n_embd,
            activation_function=config.activation_function,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            layer_norm_epsilon=config.layer_norm_epsilon,
            initializer_range=config.initializer_range,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.padding_idx,
            tie_word_embeddings=tied,
            use_cache=config.use_cache,
            n_ctx=config.block_size,  # what llama.cpp's converter asks for
        )
    )
    state = {name: values.clone() for name, values in _tensors(student)}
    if tied:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    with torch.no_grad():
        gpt2.load_state_dict(state, strict=True)
    gpt2.generation_config = GenerationConfig.from_dict(student.generation_config.to_dict())
    return gpt2.eval()


def _check_has_equal(student: Any) -> None:
    kind = str(getattr(student.config, "model_type", type(student).__name__))
    reason = _REASONS.get(kind)
    if reason is None and not isinstance(student, VanillaTransformerModelDistillation):
        raise UsageError(
            f"{type(student).__name__} is neither a Vanilla student nor a GPT-2.",
            "Use --format hf; a class that comes with transformers needs no other form.",
        )
    if reason is None and type(student) is not VanillaTransformerModelDistillation:
        reason = f"{type(student).__name__} is a class of its own, and may compute anything"
    if reason is None and student.config.final_norm == "folded":
        reason = (
            'its final norm is folded into the head (final_norm="folded"), and GPT-2 has a'
            " LayerNorm there and a head without a bias"
        )
    if reason is not None:
        raise UsageError(
            f"This student has no equal in GPT-2: {reason}.",
            "Use --format hf or onnx, which hold any student.",
        )


def _tensors(student: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors by GPT-2's names."""
    yield "transformer.wte.weight", student.wte.weight
    yield "transformer.wpe.weight", student.wpe.weight
    for index, block in enumerate(student.blocks):
        prefix = f"transformer.h.{index}"
        yield from _norm(f"{prefix}.ln_1", block.norm1)
        yield from _norm(f"{prefix}.ln_2", block.norm2)
        maps = [block.attention.query, block.attention.key, block.value]
        yield from _matrix(f"{prefix}.attn.c_attn", *maps)
        yield from _matrix(f"{prefix}.attn.c_proj", block.proj)
        yield from _matrix(f"{prefix}.mlp.c_fc", block.mlp.up)
        yield from _matrix(f"{prefix}.mlp.c_proj", block.mlp.down)
    yield from _norm("transformer.ln_f", student.final_norm)
    head = student.lm_head
    yield "lm_head.weight", _product(head) if isinstance(head, LowRankHead) else head.weight


def _norm(name: str, norm: nn.LayerNorm) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", norm.weight
    yield f"{name}.bias", torch.zeros_like(norm.weight) if norm.bias is None else norm.bias


def _matrix(name: str, *maps: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Maps side by side, as [in, out]."""
    weights = [_dense(each) for each in maps]
    biases = [_bias(each, weight) for each, weight in zip(maps, weights, strict=True)]
    yield f"{name}.weight", torch.cat(weights).T.contiguous()
    yield f"{name}.bias", torch.cat(biases)


def _dense(part: Any) -> Tensor:
    """The [out, in] matrix that a map is; M (x) I of one that mixes whole heads."""
    weight: Tensor = part.weight
    if not isinstance(part, KroneckerMap):
        return weight
    identity = torch.eye(part.config.head_dim, dtype=weight.dtype, device=weight.device)
    return torch.kron(weight, identity)


def _bias(part: Any, weight: Tensor) -> Tensor:
    bias: Tensor | None = getattr(part, "bias", None)
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def _product(head: LowRankHead) -> Tensor:
    """U D, multiplied in fp64 and rounded once."""
    product = head.up.weight.double() @ head.down.weight.double()
    return product.to(head.up.weight.dtype)
