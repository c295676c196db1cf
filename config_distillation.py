"""The architecture of a student, as one plain dataclass.

This module knows no tensor and imports nothing of the project, so a configuration can be written,
compared and saved anywhere. ``model/configuration.py`` reads its fields into a HuggingFace
configuration when a student is built; read ``model/__init__.py`` next to see which students exist.
"""

from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any

ATTN_GAINS = ("per_head", "fixed_one")
FINAL_NORMS = ("layer_norm", "folded")

MODEL_TYPES = ("Factored", "SASP", "Vanilla")
"""The students that the commands offer: those of ``model.STUDENTS``, named without torch."""


@dataclass
class GPTConfig:
    """A student's architecture. ``block_size`` is the context length in tokens, not a layer size.

    The fields down to ``teacher_n_embd`` are fixed by the tutorial, in this order. What an option
    means can depend on the kind of student:

    ===========================  =======================  =====================================
    option                       Vanilla                  Factored and SASP
    ===========================  =======================  =====================================
    ``use_v``                    always on by definition  adds a dense value matrix
    ``use_proj``                 always on by definition  adds a dense output projection
    ``use_channel_factor_v``     Kronecker, not dense     a Kronecker value map, instead of a
                                                          dense one or of none
    ``use_channel_factor_proj``  Kronecker, not dense     a Kronecker output projection, likewise
    ``attn_gain``                has no gain              trainable per head, or fixed to one
    ===========================  =======================  =====================================

    A Kronecker map mixes whole heads: ``M (x) I`` with ``M`` of shape heads x heads and the
    identity of the head width, d_head^2 times fewer weights than a dense matrix.

    Args:
        block_size: Context length in tokens, >= 1.
        vocab_size: Number of tokens, the teacher's. None is allowed until a model is built.
        n_layer: Number of transformer blocks, >= 1. Any number: a layer map finds the targets.
        n_head: Attention heads, a divisor of ``n_embd``.
        n_embd: Width of the hidden states.
        dropout: Probability of zeroing embeddings, attention weights and block outputs while
            training, in [0, 1). 0 is off.
        bias: Whether the blocks' linear maps and LayerNorms have biases. The final norm always
            has one, or the head does, since the closed-form head needs it.
        padding_idx: Id written after the end of a generated text (``config.pad_token_id``). The
            embedding of this token is trained like any other: it may be a real token (GPT-2 pads
            with its end of text), and masks come from lengths, never from ids.
        model_type: Name of the student in the registry: Vanilla, Factored, SASP, or your own.
        use_proj: See the table.
        use_v: See the table.
        use_channel_factor_v: See the table.
        use_channel_factor_proj: See the table.
        output_hidden_states: What ``forward`` does when the argument is not given.
        teacher_n_embd: Width of the teacher's hidden states, checked by the trainers. None is
            "not stated".
        attn_gain: "per_head" (default) trains one gain per head; "fixed_one" is the published form
            of the Factored block, and SASP with its three gains frozen at one.
        head_rank: Rank of the head, at least 1 and at most ``n_embd`` and ``vocab_size``. The head
            is then two matrices of ``head_rank * (n_embd + vocab_size)`` weights, and never the
            embeddings. None (default) is one full matrix.
        final_norm: "layer_norm" (default), or "folded": an RMS norm on a trainable square map of
            the hidden state and a constant, and a bias per token. It can hold the teacher's final
            norm and head behind a stitching layer exactly. Its head is never the embeddings.

    Raises:
        ValueError: If a value is out of range. All problems are listed in one message.

    Example:
        >>> GPTConfig(n_layer=2, n_embd=128, n_head=2).model_type
        'SASP'
    """

    block_size: int = 128
    vocab_size: int | None = None
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.1
    bias: bool = False
    padding_idx: int | None = None
    model_type: str = "SASP"
    use_proj: bool = False
    use_v: bool = False
    use_channel_factor_v: bool = False
    use_channel_factor_proj: bool = False
    output_hidden_states: bool = False
    teacher_n_embd: int | None = None
    attn_gain: str = field(default="per_head", kw_only=True)
    head_rank: int | None = field(default=None, kw_only=True)
    final_norm: str = field(default="layer_norm", kw_only=True)

    def __post_init__(self) -> None:
        """Refuse values that cannot describe a student."""
        self.validate()

    def __repr__(self) -> str:
        """The call that makes this configuration: the kind, and what is not the default."""
        given = {
            each.name: value
            for each in fields(self)
            if (value := getattr(self, each.name)) != each.default
        }
        shown = {"model_type": self.model_type, **given}
        return f"GPTConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def validate(self) -> None:
        """Check every field, and report everything that is wrong at once.

        Raises:
            ValueError: One line that lists the problems, one line that says what to change.
        """
        problems = [*self._wrong_numbers(), *self._wrong_choices()]
        if not problems:
            problems = self._wrong_together()
        if problems:
            raise ValueError(
                f"GPTConfig cannot describe a student: {'; '.join(problems)}.\n"
                "Change the fields named above; block_size is the context length in tokens."
            )

    def _wrong_numbers(self) -> list[str]:
        required = ("block_size", "n_layer", "n_head", "n_embd")
        optional = ("vocab_size", "teacher_n_embd", "head_rank")
        problems = [
            f"{name}={value!r} is not a whole number >= 1"
            for name in required + optional
            if (value := getattr(self, name)) is not None or name in required
            if not _is_integer(value) or value < 1
        ]
        padding: Any = self.padding_idx
        if padding is not None and (not _is_integer(padding) or padding < 0):
            problems.append(f"padding_idx={padding!r} is not a token id (a whole number >= 0)")
        dropout: Any = self.dropout
        if (
            isinstance(dropout, bool)
            or not isinstance(dropout, (int, float))
            or not 0 <= dropout < 1
        ):
            problems.append(f"dropout={dropout!r} is not a probability in [0, 1)")
        return problems

    def _wrong_choices(self) -> list[str]:
        problems = [
            f"{each.name}={value!r} is not True or False"
            for each in fields(self)
            if isinstance(each.default, bool)
            and not isinstance(value := getattr(self, each.name), bool)
        ]
        if not isinstance(self.model_type, str) or not self.model_type:
            problems.append(f"model_type={self.model_type!r} is not a name")
        if self.attn_gain not in ATTN_GAINS:
            problems.append(f"attn_gain={self.attn_gain!r} is not one of {', '.join(ATTN_GAINS)}")
        if self.final_norm not in FINAL_NORMS:
            problems.append(
                f"final_norm={self.final_norm!r} is not one of {', '.join(FINAL_NORMS)}"
            )
        return problems

    def _wrong_together(self) -> list[str]:
        problems = []
        if self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        padding, vocab = self.padding_idx, self.vocab_size
        if padding is not None and vocab is not None and padding >= vocab:
            problems.append(f"padding_idx={padding} is not below vocab_size={vocab}")
        if self.head_rank is not None:
            problems += [
                f"head_rank={self.head_rank} is above {name}={size}"
                for name, size in (("n_embd", self.n_embd), ("vocab_size", vocab))
                if size is not None and self.head_rank > size
            ]
        return problems


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
