"""HuggingFace configurations of the students.

They hold the fields of ``GPTConfig`` under the same names, and show HuggingFace's names for them
through ``attribute_map``. This file travels with every exported student, so it knows neither
``GPTConfig`` nor the rest of the project: it reads any object that has such fields.
"""

import difflib
import logging
from dataclasses import fields
from typing import Any, ClassVar, Final

from transformers import GenerationConfig, PretrainedConfig

logger = logging.getLogger(__name__)

ATTN_GAINS: Final = ("per_head", "fixed_one")
FINAL_NORMS: Final = ("layer_norm", "folded")

# What HuggingFace itself stores in, or passes through, a configuration without declaring it.
_LIBRARY_KEYS: Final = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "tie_last_hidden_states",
        "torch_dtype",
    }
)


class StudentConfig(PretrainedConfig):
    """What all students share; a kind of student adds its ``model_type`` and its defaults.

    Args:
        block_size: Context length in tokens.
        vocab_size: Number of tokens. None until a model is built.
        n_layer: Number of blocks.
        n_head: Attention heads, a divisor of ``n_embd``.
        n_embd: Width of the hidden states.
        dropout: Dropout probability while training.
        bias: Whether the blocks' linear maps and LayerNorms have biases.
        padding_idx: Also ``pad_token_id``; see ``GPTConfig`` for why no embedding is zeroed.
        use_proj: A dense output projection where the kind has none by definition.
        use_v: A dense value matrix where the kind has none by definition.
        use_channel_factor_v: A Kronecker value map in place of a dense one, or of none.
        use_channel_factor_proj: A Kronecker output projection in place of a dense one, or of none.
        teacher_n_embd: Width of the teacher's hidden states, if stated.
        attn_gain: "per_head" or "fixed_one".
        head_rank: Rank of the head, a product of two matrices. None: one full matrix.
        final_norm: "layer_norm", or "folded": see ``FoldedNorm``.
        activation_function: Name of the MLP's activation in ``transformers``. The default computes
            GPT-2's "gelu_new" in one fused operation.
        layer_norm_epsilon: Added to the variance in every norm.
        initializer_range: Standard deviation of new embeddings and (Vanilla, Factored) matrices.
        tie_word_embeddings: Whether the head reads the embedding matrix. None: where it can, i.e.
            with a head of full rank after a LayerNorm.
        use_cache: Whether ``generate`` caches. A plain ``forward`` caches only when asked to.
        bos_token_id: First token of a text, if any.
        eos_token_id: Token that ends a generated text, if any.

    Raises:
        ValueError: If a keyword is unknown, or the widths do not fit.
    """

    model_type = "student"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
        "pad_token_id": "padding_idx",
    }

    block_size: int = 128
    vocab_size: int | None = None
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.1
    bias: bool = False
    padding_idx: int | None = None
    use_proj: bool = False
    use_v: bool = False
    use_channel_factor_v: bool = False
    use_channel_factor_proj: bool = False
    teacher_n_embd: int | None = None
    attn_gain: str = "per_head"
    head_rank: int | None = None
    final_norm: str = "layer_norm"
    activation_function: str = "gelu_pytorch_tanh"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields, and refuse keywords that nobody would read."""
        self._refuse_unknown(kwargs)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}.\n"
                "Choose a width that divides evenly among the heads."
            )
        if self.attn_gain not in ATTN_GAINS:
            raise ValueError(
                f"attn_gain={self.attn_gain!r} is unknown.\nChoose one of {', '.join(ATTN_GAINS)}."
            )
        self._check_head()
        super().__post_init__(**kwargs)

    @classmethod
    def from_fields(cls, source: Any) -> "StudentConfig":
        """Build this configuration from any object with fields of these names, e.g. ``GPTConfig``.

        Fields that the object lacks keep their defaults.
        """
        names = [field.name for field in fields(cls) if hasattr(source, field.name)]
        return cls(**{name: getattr(source, name) for name in names})

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    def _check_head(self) -> None:
        if self.final_norm not in FINAL_NORMS:
            raise ValueError(
                f"final_norm={self.final_norm!r} is unknown.\n"
                f"Choose one of {', '.join(FINAL_NORMS)}."
            )
        most = min(self.n_embd, self.n_embd if self.vocab_size is None else self.vocab_size)
        if self.head_rank is not None and not 1 <= self.head_rank <= most:
            raise ValueError(
                f"head_rank={self.head_rank} is not between 1 and {most}, the smaller of n_embd "
                "and vocab_size.\nChoose a rank in between, or None for a full matrix."
            )
        can_tie = self.head_rank is None and self.final_norm == "layer_norm"
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = can_tie
        if self.tie_word_embeddings and not can_tie:
            raise ValueError(
                f"A head with head_rank={self.head_rank} after final_norm={self.final_norm!r} "
                "cannot be the embedding matrix.\n"
                "Leave tie_word_embeddings out, or head_rank and final_norm."
            )

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        known = _LIBRARY_KEYS | set(self.attribute_map)
        known |= set(GenerationConfig._get_default_generation_params())
        unknown = sorted(key for key in kwargs if key not in known and not key.startswith("_"))
        if not unknown:
            return
        names = sorted(field.name for field in fields(self))
        nearest = difflib.get_close_matches(unknown[0], [*names, *self.attribute_map], n=1)
        hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Known: {', '.join(names)}."
        raise ValueError(f"{type(self).__name__} has no setting {', '.join(unknown)}.\n{hint}")


class VanillaConfig(StudentConfig):
    """Configuration of the Vanilla student, a pre-LN GPT. Always has value and output matrices."""

    model_type = "Vanilla"

    def __post_init__(self, **kwargs: Any) -> None:
        """Say once that two options ask for what a Vanilla block always has."""
        super().__post_init__(**kwargs)
        if self.use_v or self.use_proj:
            logger.warning(
                "A Vanilla block always has a value matrix and an output projection: "
                "use_v and use_proj change nothing here."
            )


class FactoredConfig(StudentConfig):
    """Configuration of the token-factored student with its two streams."""

    model_type = "Factored"


class SASPConfig(StudentConfig):
    """Configuration of the SASP student: skipless, parallel branches, ReLU as in its paper."""

    model_type = "SASP"

    activation_function: str = "relu"


for _config_class in (VanillaConfig, FactoredConfig, SASPConfig):
    # An exported student carries these files, so that it loads where this project is not installed.
    _config_class.register_for_auto_class()
