"""The settings of the built-in teacher's training. No torch, so that ``--help`` answers at once."""

from dataclasses import dataclass
from typing import Final

from cleangpt.errors import UsageError

# The 256 bytes and the end-of-text token.
SMALLEST_VOCABULARY: Final = 257


@dataclass(frozen=True)
class PretrainingSettings:
    """Everything that decides the teacher's weights, next to the text itself.

    Args:
        vocab_size: Tokens in the vocabulary.
        context_length: Window length, in tokens.
        n_layer: Blocks.
        n_embd: Width.
        n_head: Attention heads per block.
        dropout: Probability, on embeddings and both residual branches. Attention weights have
            none: their masks alone would cost a sixth of the training time.
        batch_size: Windows per optimizer step.
        steps: Optimizer steps; sets when the learning rate starts to fall.
        learning_rate: Peak rate, of Muon for the blocks' matrices and of AdamW for the rest.
        warmup_steps: Steps of linear warm-up.
        cooldown: Last share of the steps, in which the rate falls linearly to zero.
        weight_decay: On the blocks' matrices only; not on embeddings, norms and biases.
        max_grad_norm: Gradient clipping.
        average_decay: Decay per step of the weight average that is evaluated and shipped.
        eval_every: Steps between two validations.
        seed: Seed of weights, windows and dropout.
        bf16: Matrix products in bfloat16 by autocast; parameters stay in float32.
    """

    vocab_size: int = 2048
    context_length: int = 256
    n_layer: int = 6
    n_embd: int = 192
    n_head: int = 6
    dropout: float = 0.15
    batch_size: int = 8
    steps: int = 3000
    learning_rate: float = 2.5e-3
    warmup_steps: int = 100
    cooldown: float = 0.5
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    average_decay: float = 0.995
    eval_every: int = 200
    seed: int = 0
    bf16: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any text is read."""
        if self.n_embd % self.n_head:
            raise UsageError(
                f"A width of {self.n_embd} cannot be shared out to {self.n_head} heads.",
                "Make --n_embd a multiple of --n_head.",
            )
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise UsageError(
                f"A vocabulary of {self.vocab_size} tokens does not hold every byte.",
                f"Use --vocab_size {SMALLEST_VOCABULARY} or more.",
            )
        if self.context_length < 2:
            raise UsageError(
                f"A window of {self.context_length} token has nothing to predict.",
                "Use --context_length 2 or more.",
            )
