"""A teacher's weights in one form, whatever its family calls them.

Three layouts of attention cover most decoder-only families: GPT-2's (one transposed matrix for
queries, keys and values), GPT-NeoX's (one matrix, head by head), and the one with ``q_proj``,
``k_proj`` and ``v_proj``. What is not recognised is None, and the student's part starts as built.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cleangpt.blocks import BlockStack

_LOUD = 1e3


@dataclass(frozen=True, eq=False)
class Norm:
    """What a norm does after normalising: gain and bias, [d]."""

    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    subtracts_mean: bool


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``y = weight x + bias``; the weight has shape [out, in]."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"]

    def rows(self, chosen: Tensor | slice) -> "LinearMap":
        """Some outputs of it."""
        return LinearMap(self.weight[chosen], self.bias[chosen])

    def times(self, factor: float | Float[Tensor, " out"]) -> "LinearMap":
        """The same map, its outputs scaled."""
        return LinearMap((self.weight.T * factor).T, self.bias * factor)

    def after(self, norm: Norm) -> "LinearMap":
        """The same map with the norm's gain and bias folded in, to be fed the plain norm."""
        return LinearMap(self.weight * norm.gain, self.bias + self.weight @ norm.bias)


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """``out [A_1 V_1; ...]`` with scores divided by the root of the head's width.

    All maps but ``out`` read the plain norm: its gain and bias are in them. They have one group of
    rows per head; keys and values that heads share are repeated.
    """

    query: LinearMap
    key: LinearMap
    value: LinearMap
    out: LinearMap
    num_heads: int


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """``down act(up x)`` with x the plain norm: its gain and bias are in ``up``."""

    up: LinearMap
    down: LinearMap
    activation: str | None


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """One teacher block; a part is None where the family's form is not this one."""

    attention: AttentionWeights | None
    mlp: MLPWeights | None
    missing: tuple[str, ...] = ()


ATTENTION = ("attn", "self_attn", "attention", "self_attention")
ATTENTION_NORM = ("ln_1", "input_layernorm", "self_attn_layer_norm")
OUT = ("c_proj", "o_proj", "out_proj", "dense")
MLP_NORM = ("ln_2", "post_attention_layernorm", "final_layer_norm")
UP_DOWN = (
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("up_proj", "down_proj"),
)
POST_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def read_block(teacher: BlockStack, index: int) -> BlockWeights:
    """The weights of one block, in float32 copies."""
    block: Any = teacher.block(index)
    config = teacher.model.config.get_text_config()
    normed_after = any(hasattr(block, name) for name in POST_NORMS)
    if normed_after or not getattr(block, "do_layer_norm_before", True):
        return BlockWeights(None, None, ("blocks: the teacher's norms stand after their parts",))
    norms = [read_norm(first_part(block, names), config) for names in (ATTENTION_NORM, MLP_NORM)]
    inner = first_part(block, ATTENTION)
    attention = _attention(inner, norms[0], config)
    mlp, gated = _mlp(getattr(block, "mlp", block), norms[1], config)
    missing = []
    if any(norm is not None and not norm.subtracts_mean for norm in norms):
        missing.append("norms: the teacher's do not subtract the mean")
    if attention is None:
        missing.append("attention: its layout is not known here")
    elif hasattr(inner, "q_norm"):
        missing.append("norms of queries and keys: taken as constants")
    if gated:
        missing.append("MLP: the teacher's is gated")
    elif mlp is None:
        missing.append("MLP: its layout is not known here")
    if getattr(block, "use_parallel_residual", False):
        missing.append("the order: the teacher's MLP reads what its attention reads")
    # Granite scales what both parts write.
    multiplier = float(getattr(block, "residual_multiplier", 1.0))
    if attention is not None:
        attention = replace(attention, out=attention.out.times(multiplier))
    if mlp is not None:
        mlp = replace(mlp, down=mlp.down.times(multiplier))
    return BlockWeights(attention, mlp, tuple(missing))


def _attention(inner: Any, norm: Norm | None, config: Any) -> AttentionWeights | None:
    out = None if inner is None else first_part(inner, OUT)
    heads = int(config.num_attention_heads)
    if norm is None or out is None:
        return None
    maps = attention_maps(inner, heads)
    if maps is None:
        return None
    query, key, value = (linear.after(norm) for linear in maps)
    width = query.weight.shape[0] // heads
    if hasattr(inner, "q_norm"):
        if inner.q_norm.weight.shape != (width,):
            return None
        query, key = _normed(query, inner.q_norm, width), _normed(key, inner.k_norm, width)
    query = query.times(float(getattr(inner, "scaling", width**-0.5)) * width**0.5)
    key, value = (repeated(linear, heads, width) for linear in (key, value))
    return AttentionWeights(query, key, value, linear_map(out), heads)


def attention_maps(inner: Any, heads: int) -> list[LinearMap] | None:
    """Queries, keys and values of an attention module; None if its layout is not known here."""
    name = fused_name(inner)
    if name is None:
        names = ("q_proj", "k_proj", "v_proj")
        if not all(hasattr(inner, name) for name in names):
            return None
        return [linear_map(getattr(inner, name)) for name in names]
    fused = linear_map(getattr(inner, name))
    if len(fused.weight) != 3 * fused.weight.shape[1]:
        return None
    return [fused.rows(part) for part in fused_rows(name, len(fused.weight), heads)]


def fused_name(inner: Any) -> str | None:
    """What one matrix of queries, keys and values is called."""
    # GPT-BigCode has a c_attn of another order, and no Conv1D.
    if isinstance(getattr(inner, "c_attn", None), Conv1D):
        return "c_attn"
    return "query_key_value" if hasattr(inner, "query_key_value") else None


def fused_rows(name: str, count: int, heads: int) -> Tensor:
    """Which rows of such a matrix are queries, keys and values, [3, rows].

    GPT-2 has one after the other, GPT-NeoX and BLOOM head by head.
    """
    rows = torch.arange(count)
    if name == "c_attn":
        return rows.view(3, -1)
    return rows.view(heads, 3, -1).transpose(0, 1).flatten(1)


def _normed(linear: LinearMap, norm: Any, width: int) -> LinearMap:
    """The linear map nearest to ``norm(W x)`` per head: its mean square is taken as a constant.

    For x of unit variance in every direction it is ``|W|^2 / width``.
    """
    sizes = linear.weight.unflatten(0, (-1, width)).square().sum((1, 2)).div(width).sqrt()
    gains = gain_and_bias(norm, width)[0]
    return linear.times((gains / sizes[:, None]).flatten())


def repeated(shared: LinearMap, heads: int, width: int) -> LinearMap:
    """Keys or values that heads share, once per head."""
    groups = shared.weight.shape[0] // width
    rows = torch.arange(groups * width).view(groups, width)
    return shared.rows(rows.repeat_interleave(heads // groups, dim=0).flatten())


def _mlp(inner: Any, norm: Norm | None, config: Any) -> tuple[MLPWeights | None, bool]:
    """The MLP's weights, and whether it is a gated one, which has no such form."""
    if hasattr(inner, "gate_proj") or hasattr(inner, "gate_up_proj"):
        return None, True
    activation = getattr(config, "activation_function", getattr(config, "hidden_act", None))
    for up, down in UP_DOWN:
        if norm is not None and hasattr(inner, up) and hasattr(inner, down):
            first, second = linear_map(getattr(inner, up)), linear_map(getattr(inner, down))
            return MLPWeights(first.after(norm), second, activation), False
    return None, False


def read_norm(module: Any, config: Any) -> Norm | None:
    """What a norm does, found by use; None is none."""
    if module is None:
        return None
    width = int(config.hidden_size)
    gain, bias = gain_and_bias(module, width)
    shifted = _applied(module, torch.full((width,), _LOUD)) - bias
    return Norm(gain, bias, bool(shifted.abs().max() < 0.5 * gain.abs().max()))


def gain_and_bias(module: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Found by use, since families store them differently: Gemma's gain is one plus its weight.

    A vector of +-c has mean zero and mean square c^2, so that both kinds of norm only scale it.
    """
    signs = 1.0 - 2.0 * (torch.arange(width) % 2)
    there, back = _applied(module, _LOUD * signs), _applied(module, -_LOUD * signs)
    return signs * (there - back) / 2, (there + back) / 2


def _applied(module: nn.Module, vector: Tensor) -> Tensor:
    like = next(iter(module.parameters()), vector)
    return _copy(module(vector.to(like)[None])[0])


def writing_parts(block: Any) -> list[Any]:
    """The maps of a block that write to the stream: attention's output, and the MLP's."""
    inner, mlp = first_part(block, ATTENTION), getattr(block, "mlp", block)
    downs = tuple(down for _, down in UP_DOWN)
    found = [first_part(inner, OUT), first_part(mlp, downs)]
    return [part for part in found if part is not None]


def linear_map(module: Any) -> LinearMap:
    """A module's weight and bias, in float32 copies."""
    weight = _copy(module.weight)
    weight = weight.T if isinstance(module, Conv1D) else weight
    bias = torch.zeros(weight.shape[0]) if module.bias is None else _copy(module.bias)
    return LinearMap(weight, bias)


def first_part(module: Any, names: tuple[str, ...]) -> Any:
    """The first of the named parts that a module has; None if it has none."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
