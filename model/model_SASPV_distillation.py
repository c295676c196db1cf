"""The SASP student: no skip connections, and attention and MLP side by side on one norm.

    u   = RMSNorm(x)
    y_h = (alpha_h I + beta_h A_h - gamma_h C) u_h       C[t, j] = 1/t for j <= t
    x'  = [y_1 ; ... ; y_H] + beta_FF MLP(u)

No value matrix, no output projection, one norm. ``C`` is what ``A`` would be if it saw no content;
``W_Q = 0`` at the start makes them equal, so a new block passes u on unchanged. C is never built:
``C u`` is a running mean over real tokens, and ``A u`` is fused attention with u as values.

Cached per block: K, u as V, and the sum of u so far. Weights per block: 10 n_embd^2.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, initialization as init
from transformers.cache_utils import DynamicLayer

from .configuration import SASPConfig
from .layers import (
    MLP,
    BlockParts,
    CausalAttention,
    Context,
    StudentBlock,
    channel_map,
    head_gain,
    init_identity,
)
from .student import StudentModel


class RunningSumLayer(DynamicLayer):
    """Keys and values of one block, and the sum of its values over all positions so far.

    The sum makes one decoding step of the running mean independent of the length. It follows the
    values through everything that beam search and assisted decoding do to a cache.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.value_sum: Tensor | None = None  # (B, H, D)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new positions, (B, H, T, D) each, and return all positions."""
        new = _sum_positions(value_states)
        self.value_sum = new if self.value_sum is None else self.value_sum + new
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Drop the last positions."""
        super().crop(*args, **kwargs)
        if self.value_sum is not None:
            self.value_sum = _sum_positions(self.values)

    def reset(self) -> None:
        """Forget every position."""
        super().reset()
        self.value_sum = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row continue the beam that ``beam_idx`` names."""
        super().reorder_cache(beam_idx)
        self._map_sum(lambda total: total.index_select(0, beam_idx.to(total.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._map_sum(lambda total: total.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that ``indices`` names."""
        super().batch_select_indices(indices)
        self._map_sum(lambda total: total[indices])

    def _map_sum(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.value_sum is not None:
            self.value_sum = change(self.value_sum)


def _sum_positions(values: Tensor) -> Tensor:
    """Sum (B, H, S, D) over positions, in at least fp32."""
    return values.sum(dim=-2, dtype=torch.promote_types(values.dtype, torch.float32))


def _cached_sum(cache: Cache | None, layer_idx: int) -> Tensor | None:
    """Return the (B, 1, H * D) sum of one block's cached values, None if there are none."""
    if cache is None or cache.get_seq_length(layer_idx) == 0:
        return None
    layer = cache.layers[layer_idx]
    total = layer.value_sum if isinstance(layer, RunningSumLayer) else None
    if total is None:  # a foreign kind of layer, but its values are all that is needed
        total = _sum_positions(layer.values)
    return total.flatten(1).unsqueeze(1)


def running_mean(values: Tensor, context: Context, past_sum: Tensor | None = None) -> Tensor:
    """Return C v, the mean of (B, T, C) values over the real tokens up to each position.

    ``values`` must be zero at padding. Summed in at least fp32: bf16 loses 1/t after some 256
    positions.
    """
    sums = values.cumsum(dim=1, dtype=torch.promote_types(values.dtype, torch.float32))
    if past_sum is not None:
        sums = sums + past_sum
    return (sums / context.num_tokens).to(values.dtype)


class SASPBlock(StudentBlock):
    """A parallel, skipless block with shaped attention.

    ``alpha``, ``beta`` and ``gamma`` are trainable per head and start at one (``attn_gain`` =
    "fixed_one" keeps them there); ``beta_ff`` is a trainable number, 0.1 at 18 blocks and
    proportional to 1/sqrt(n_layer). Since no skip keeps the signal alive, matrices start at
    N(0, 1/fan_in). With value and output maps (identity at the start), all three terms act on
    ``V u`` and the sum is projected. Dropout on attention acts on A only.

    References:
        He, Hofmann, arXiv:2311.01906, sections 3 to 4.4, equations 5, 7, 12 and 13 (SAS-P).
    """

    def __init__(self, config: SASPConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.norm = nn.RMSNorm(config.n_embd, config.layer_norm_epsilon)
        self.value = channel_map(config, dense=config.use_v, kronecker=config.use_channel_factor_v)
        self.attention = CausalAttention(config, layer_idx)
        self.alpha = head_gain(config, initial=1.0)
        self.beta = head_gain(config, initial=1.0)
        self.gamma = head_gain(config, initial=1.0)
        self.proj = channel_map(
            config, dense=config.use_proj, kronecker=config.use_channel_factor_proj
        )
        self.mlp = MLP(config)
        self.beta_ff = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        """Make the attention branch the identity."""
        init.zeros_(self.attention.query.weight)
        for linear in (self.attention.key, self.mlp.up, self.mlp.down):
            init.normal_(linear.weight, std=linear.in_features**-0.5)
        init_identity(self.value)
        init_identity(self.proj)
        init.constant_(self.beta_ff, 0.1 * (18 / self.config.n_layer) ** 0.5)

    def parts(self) -> BlockParts:
        """Name the MLP: scores are compared with uniform ones here, and move u and nothing else."""
        return BlockParts(self.norm, self.mlp, mlp_gain=self.beta_ff)

    def forward(
        self, state: Tensor, context: Context, past_key_values: Cache | None = None
    ) -> Tensor:
        """Map the (B, T, n_embd) state to the next."""
        u = self.norm(state)
        v = context.silence_padding(self.value(u))
        # Before the attention appends v to the cache.
        mean = running_mean(v, context, _cached_sum(past_key_values, self.layer_idx))
        mixed = self.attention(u, v, context, past_key_values)
        y = self.proj(self.alpha(v) + self.beta(mixed) - self.gamma(mean))
        return y + self.beta_ff * self.mlp(u)


class SASPTransformerModelDistillation(StudentModel):
    """The simplified student, with the shortest block."""

    config_class: ClassVar[type[SASPConfig]] = SASPConfig
    block_class: ClassVar[type[SASPBlock]] = SASPBlock
    _no_split_modules: ClassVar[list[str]] = ["SASPBlock"]

    def adapt_cache(self, cache: Cache) -> None:
        """Let an empty cache, such as ``generate`` makes, keep the running sums as well."""
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        if isinstance(cache, DynamicCache) and plain and cache.get_seq_length() == 0:
            cache.layers = [RunningSumLayer() for _ in self.blocks]


SASPTransformerModelDistillation.register_for_auto_class("AutoModelForCausalLM")
