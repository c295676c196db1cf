"""The Factored student: a token stream that attention moves, and a context stream that MLPs write.

    xt_0 = wte[token] + wpe[position],   xe_0 = 0
    Q, K = W_{Q,K} LN_1(xt + xe)
    xt'  = xt + g_h A_h xt_h                          the values are xt itself, not normalised
    xe'  = xe + MLP(LN_2(xt' + xe))
    logits = W_U LN_f(xt_L + xe_L)

A block's state is ``[xt ; xe]``, both streams side by side; the hidden state is their sum. Cached
per block: K, and xt before the block's own update, as V. Weights per block: 10 n_embd^2.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, initialization as init

from .configuration import FactoredConfig
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


class FactoredBlock(StudentBlock):
    """One dual-stream block.

    Deviation from the paper: ``g_h``, trainable per head and 1/(2 n_layer) at the start. With unit
    gain and the near-uniform attention of a new model, what all positions have in common doubles
    with each block: after twelve, every position looks the same. ``attn_gain="fixed_one"`` is the
    published form. Value and output maps exist only if asked for, and start as the identity.

    References:
        Kerce, Fox, arXiv:2603.07461 (dual-stream transformer, Kronecker mixing); arXiv:2603.07482.
    """

    def __init__(self, config: FactoredConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.norm1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.norm2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.value = channel_map(config, dense=config.use_v, kronecker=config.use_channel_factor_v)
        self.attention = CausalAttention(config, layer_idx)
        self.gain = head_gain(config, initial=1 / (2 * config.n_layer))
        self.proj = channel_map(
            config, dense=config.use_proj, kronecker=config.use_channel_factor_proj
        )
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = MLP(config)

    def init_weights(self) -> None:
        """Start the optional maps as the identity, and the MLP's writes scaled as in GPT-2."""
        init_identity(self.value)
        init_identity(self.proj)
        std = self.config.initializer_range / (2 * self.config.n_layer) ** 0.5
        init.normal_(self.mlp.down.weight, std=std)

    def parts(self) -> BlockParts:
        """Name all but value and output maps: here those carry a stream of its own, not normed."""
        return BlockParts(self.norm2, self.mlp, self.norm1, self.attention)

    def forward(
        self, state: Tensor, context: Context, past_key_values: Cache | None = None
    ) -> Tensor:
        """Map the (B, T, 2 n_embd) state to the next."""
        xt, xe = state.chunk(2, dim=-1)
        mixed = self.attention(self.norm1(xt + xe), self.value(xt), context, past_key_values)
        xt = xt + self.dropout(self.proj(self.gain(mixed)))
        xe = xe + self.mlp(self.norm2(xt + xe))
        return torch.cat((xt, xe), dim=-1)


class FactoredTransformerModelDistillation(StudentModel):
    """The dual-stream student. Both streams enter a block; their sum is what is taught."""

    config_class: ClassVar[type[FactoredConfig]] = FactoredConfig
    block_class: ClassVar[type[FactoredBlock]] = FactoredBlock
    _no_split_modules: ClassVar[list[str]] = ["FactoredBlock"]

    def initial_state(self, embeddings: Tensor) -> Tensor:
        """Return the embeddings as token stream, and an empty context stream."""
        return torch.cat((embeddings, torch.zeros_like(embeddings)), dim=-1)

    def read_hidden_states(self, state: Tensor) -> Tensor:
        """Return the sum of the two streams."""
        xt, xe = state.chunk(2, dim=-1)
        return xt + xe

    def replace_hidden_states(self, state: Tensor, hidden: Tensor) -> Tensor:
        """Return the state with its own token stream and the context stream that gives the sum."""
        xt, _ = state.chunk(2, dim=-1)
        return torch.cat((xt, hidden - xt), dim=-1)


FactoredTransformerModelDistillation.register_for_auto_class("AutoModelForCausalLM")
