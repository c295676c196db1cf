"""The parts that students are assembled from: attention, value and output maps, gains, the MLP.

Everything here takes and returns ``(batch, seq, width)``; heads exist only inside a part. In shape
comments B is batch, T the new positions, S all positions so far, H heads, D the head width.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration import StudentConfig


@dataclass(frozen=True, eq=False)
class Context:
    """What every block of one forward pass must know about positions.

    Attributes:
        mask: (B or 1, 1, T, S) booleans, True where a query may read a key. None leaves it to the
            fused kernel: causal if ``is_causal``, else everything.
        is_causal: Whether the kernel's own causal mask is right.
        is_token: (B, T, 1) booleans, False at padding. None where nothing is padded.
        num_tokens: (B or 1, T, 1), the number of real tokens up to each position, at least 1.
        attentions: Collects the weights of each block, or None when nobody asked for them.
    """

    mask: Tensor | None
    is_causal: bool
    is_token: Tensor | None
    num_tokens: Tensor
    attentions: list[Tensor] | None = None

    @classmethod
    def of(
        cls,
        attention_mask: Tensor | None,
        num_new: int,
        num_past: int,
        device: torch.device,
        attentions: list[Tensor] | None = None,
    ) -> "Context":
        """Read a (B, S) mask of ones and zeros (None: no padding) for ``num_new`` new positions."""
        if attention_mask is None:
            counts = torch.arange(num_past + 1, num_past + num_new + 1, device=device)
            num_tokens, is_token = counts[None, :, None], None
        else:
            seen = attention_mask.long().cumsum(dim=-1)[:, -num_new:, None]
            num_tokens, is_token = seen.clamp(min=1), attention_mask[:, -num_new:, None].bool()
        if num_past == 0 and not _hides_earlier(attention_mask):
            return cls(None, num_new > 1, is_token, num_tokens, attentions)
        if attention_mask is None and num_new == 1:
            return cls(None, False, None, num_tokens, attentions)
        mask = _causal_mask(attention_mask, num_new, num_past, device)
        return cls(mask, False, is_token, num_tokens, attentions)

    def silence_padding(self, values: Tensor) -> Tensor:
        """Set (B, T, C) values to zero at padding, so that they add nothing to a sum."""
        return values if self.is_token is None else values * self.is_token


def _hides_earlier(attention_mask: Tensor | None) -> bool:
    """Whether some real token has padding before it, so that a causal mask alone would be wrong.

    Right padding lies after every real token and needs no mask. The values are read only on the
    CPU: anywhere else it would stop the device's queue, and a graph that is exported has none to
    read; there a given mask is always built.
    """
    if attention_mask is None:
        return False
    if attention_mask.device.type != "cpu" or torch.compiler.is_exporting():
        return True
    return bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())


def _causal_mask(
    attention_mask: Tensor | None, num_new: int, num_past: int, device: torch.device
) -> Tensor:
    keys = torch.arange(num_past + num_new, device=device)
    queries = keys[num_past:, None]
    allowed = (keys <= queries)[None, None]  # (1, 1, T, S)
    if attention_mask is None:
        return allowed
    # A row without a single key has no softmax: padding may always read itself.
    itself = (keys == queries)[None, None]
    return (allowed & attention_mask.bool()[:, None, None, :]) | itself


class CausalAttention(nn.Module):
    """A_h V_h for every head: scores, softmax and weighted sum, shared by all students.

    A_h = softmax(Q_h K_h^T / sqrt(d_head) + causal mask), with Q and K linear in the normed state.
    The values come from the caller, since that is where the students differ.
    """

    def __init__(self, config: StudentConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.key = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, normed: Tensor, values: Tensor, context: Context, past_key_values: Cache | None
    ) -> Tensor:
        """Return the heads' outputs side by side, (B, T, n_embd)."""
        query, key = self._heads(self.query(normed)), self._heads(self.key(normed))
        value = self._heads(values)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, S, D)
        dropout = self.config.dropout if self.training else 0.0
        if context.attentions is not None or self.config._attn_implementation == "eager":
            mixed, weights = _eager_attention(query, key, value, context, dropout)
            if context.attentions is not None:
                context.attentions.append(weights)
        else:
            mixed = _fused_attention(query, key, value, context, dropout)
        return mixed.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H * D)

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2)  # (B, H, T, D)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, context: Context, dropout: float
) -> Tensor:
    """PyTorch's kernel; in float32 under CPU autocast, where its bf16 backward takes twice as long.

    Forward and backward of 8 x 128 positions in 6 heads of 64: 11 ms in float32, 19 ms in bf16.
    """
    attend = partial(
        F.scaled_dot_product_attention,
        attn_mask=context.mask,
        dropout_p=dropout,
        is_causal=context.is_causal,
    )
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attend(query.float(), key.float(), value.float())
    return attend(query, key, value)


def _eager_attention(
    query: Tensor, key: Tensor, value: Tensor, context: Context, dropout: float
) -> tuple[Tensor, Tensor]:
    """The same attention in plain operations, with the weights; softmax in at least fp32."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, H, T, S)
    mask = context.mask
    if context.is_causal:
        mask = _causal_mask(None, query.shape[-2], 0, query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)
    weights = F.dropout(weights.to(value.dtype), dropout)
    return weights @ value, weights


class KroneckerMap(nn.Module):
    """Mixing of whole heads: y_g = sum_h M[g, h] x_h, i.e. the matrix M (x) I_{d_head}.

    References:
        Kerce, Fox, arXiv:2603.07461 (channelised mixing).
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_head, config.n_head))

    def init_weights(self) -> None:
        """Draw entries that give outputs the size which a dense matrix's would have."""
        init.normal_(self.weight, std=self.config.initializer_range * self.config.head_dim**0.5)

    def forward(self, states: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        heads = states.unflatten(-1, (self.weight.shape[0], -1))  # (B, T, H, D)
        return (self.weight @ heads).flatten(-2)


def channel_map(config: StudentConfig, *, dense: bool, kronecker: bool) -> nn.Module:
    """Return a value or output map: Kronecker if asked for, else dense if asked for, else none."""
    if kronecker:
        return KroneckerMap(config)
    if dense:
        return nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
    return nn.Identity()


class HeadGain(nn.Module):
    """One factor per head, y_h = g_h x_h. 1-D, so that weight decay leaves it alone."""

    def __init__(self, config: StudentConfig, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.empty(config.n_head))

    def init_weights(self) -> None:
        """Set every gain to its initial value."""
        init.constant_(self.weight, self.initial)

    def forward(self, states: Tensor) -> Tensor:
        """Scale (B, T, C) by head."""
        heads = states.unflatten(-1, (self.weight.shape[0], -1))  # (B, T, H, D)
        return (self.weight[:, None] * heads).flatten(-2)


def head_gain(config: StudentConfig, initial: float) -> nn.Module:
    """Return the gain that ``attn_gain`` asks for: trainable per head, or none (fixed to one)."""
    return HeadGain(config, initial) if config.attn_gain == "per_head" else nn.Identity()


class MLP(nn.Module):
    """W_2 act(W_1 u + b_1) + b_2 with four times the width inside, then dropout."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACT2FN[config.activation_function]
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.dropout(self.down(self.act(self.up(states))))


class LowRankHead(nn.Module):
    """Logits U (D f) + b from features f, with D of rank x width and U of vocabulary x rank."""

    def __init__(self, width: int, rank: int, vocab_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, vocab_size, bias=bias)

    @property
    def weight(self) -> Tensor:
        """The product U D of shape (vocab, width), formed at each use; gradients reach both."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """One number per token, or None."""
        return self.up.bias

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., width) to (..., vocab)."""
        return self.up(self.down(features))


class FoldedNorm(nn.Module):
    """An RMS norm on a square map of the hidden state h and a constant, y = R [h; 1].

    The features y / sqrt(mean(y^2) + eps) are one wider than h. With z = P h + c, the LayerNorm or
    RMS norm of z divides by the root of a quadratic form in [h; 1], whose square root is R. What it
    divides is linear in y. So this norm and a linear head can equal another model's final norm and
    head behind an affine map. R starts as the identity.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_epsilon
        self.weight = nn.Parameter(torch.empty(config.n_embd + 1, config.n_embd + 1))

    def init_weights(self) -> None:
        """Start as the RMS norm of [h; 1]."""
        init.eye_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., C) to (..., C + 1)."""
        # A norm, so in the weights' own precision: R holds scales thousands apart.
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.weight.dtype)
            mapped = F.linear(hidden, self.weight[:, :-1], self.weight[:, -1])
            return F.rms_norm(mapped, mapped.shape[-1:], eps=self.eps)


def final_norm(config: StudentConfig) -> nn.Module:
    """Return the norm between the last block and the head."""
    if config.final_norm == "folded":
        return FoldedNorm(config)
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


def output_head(config: StudentConfig, vocab_size: int) -> nn.Module:
    """Return the head; it has a bias where the norm before it cannot carry one."""
    folded = config.final_norm == "folded"
    width = config.n_embd + 1 if folded else config.n_embd
    if config.head_rank is None:
        return nn.Linear(width, vocab_size, bias=folded)
    return LowRankHead(width, config.head_rank, vocab_size, bias=folded)


@dataclass(frozen=True, eq=False)
class BlockParts:
    """What a block has in common with a pre-LN transformer block, so that it can start from one.

    Attributes:
        mlp_norm: What the MLP reads the state through.
        mlp: The MLP.
        attention_norm: What queries and keys read the state through, or None with ``attention``.
        attention: Queries and keys; None if their scores mean something else.
        value: Dense map of the same normed state; None without one. Then there is no ``out``.
        out: Dense map to the state.
        mlp_gain: Factor of the MLP's output in a block that passes on its normed input. None: the
            input itself is passed on, and the factor is one.
    """

    mlp_norm: nn.Module
    mlp: MLP
    attention_norm: nn.Module | None = None
    attention: CausalAttention | None = None
    value: nn.Linear | None = None
    out: nn.Linear | None = None
    mlp_gain: nn.Parameter | None = None


class StudentBlock(GradientCheckpointingLayer):
    """One transformer block: takes a state, returns the next state, one tensor each.

    A kind of student implements ``forward(state, context, past_key_values=None)``, and overrides
    ``init_weights`` where its start differs from N(0, initializer_range) matrices, and ``parts``
    where it can start from a teacher's block.
    """

    def __init__(self, config: StudentConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    def init_weights(self) -> None:
        """Set what this kind of block starts from; called after its parts were initialised."""

    def parts(self) -> BlockParts | None:
        """Name what a teacher's weights may be put into; None: nothing."""
        return None


def init_identity(module: nn.Module) -> None:
    """Start an optional map as the identity, so that adding it does not change the student."""
    if isinstance(module, (nn.Linear, KroneckerMap)):
        init.eye_(module.weight)
