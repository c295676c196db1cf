"""The Vanilla student: a pre-LN GPT, the same shape as a GPT-2 teacher, only smaller.

    a  = x + W_O [A_1 V_1 ; ... ; A_H V_H],   Q, K, V = W_{Q,K,V} LN_1(x)
    x' = a + MLP(LN_2(a))

Cached per block: K and V. Weights per block: 12 n_embd^2 (without biases).
Read ``student.py`` for what surrounds the blocks, and ``layers.py`` for attention and the MLP.
"""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn
from transformers import Cache, initialization as init

from .configuration import VanillaConfig
from .layers import MLP, BlockParts, CausalAttention, Context, StudentBlock, channel_map
from .student import StudentModel


class VanillaBlock(StudentBlock):
    """A pre-LN block. Both maps around the attention always exist: dense, or Kronecker if asked.

    References:
        Radford et al. (2019), GPT-2, section 2.3: pre-LN, and residual writes scaled at the start.
    """

    def __init__(self, config: VanillaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.norm1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.norm2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.value = channel_map(config, dense=True, kronecker=config.use_channel_factor_v)
        self.attention = CausalAttention(config, layer_idx)
        self.proj = channel_map(config, dense=True, kronecker=config.use_channel_factor_proj)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = MLP(config)

    def init_weights(self) -> None:
        """Divide both writes to the residual stream by sqrt(2 n_layer): its size stays bounded."""
        std = self.config.initializer_range / (2 * self.config.n_layer) ** 0.5
        per_head = self.config.head_dim**0.5 if self.config.use_channel_factor_proj else 1.0
        init.normal_(self.proj.weight, std=std * per_head)
        init.normal_(self.mlp.down.weight, std=std)

    def parts(self) -> BlockParts:
        """Name everything; value and output maps only if both are dense."""
        found = BlockParts(self.norm2, self.mlp, self.norm1, self.attention)
        if isinstance(self.value, nn.Linear) and isinstance(self.proj, nn.Linear):
            return replace(found, value=self.value, out=self.proj)
        return found

    def forward(
        self, state: Tensor, context: Context, past_key_values: Cache | None = None
    ) -> Tensor:
        """Map the (B, T, n_embd) state to the next."""
        normed = self.norm1(state)
        mixed = self.attention(normed, self.value(normed), context, past_key_values)
        state = state + self.dropout(self.proj(mixed))
        return state + self.mlp(self.norm2(state))


class VanillaTransformerModelDistillation(StudentModel):
    """A small GPT. May be subclassed: ``forward`` and ``get_num_params`` may be overridden."""

    config_class: ClassVar[type[VanillaConfig]] = VanillaConfig
    block_class: ClassVar[type[VanillaBlock]] = VanillaBlock
    _no_split_modules: ClassVar[list[str]] = ["VanillaBlock"]


VanillaTransformerModelDistillation.register_for_auto_class("AutoModelForCausalLM")
