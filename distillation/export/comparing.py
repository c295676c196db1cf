"""Whether an export computes what the student computes."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from cleangpt.errors import CheckpointError

LIMIT: Final = 1e-5
"""Largest difference of a logit, as a share of the largest logit: orders of addition in fp32."""


class Difference(NamedTuple):
    """How far two sets of logits are apart, at most, and how large the first are."""

    largest: float
    largest_logit: float

    @classmethod
    def of(cls, expected: Tensor, found: Tensor) -> "Difference":
        """Between logits of one shape."""
        apart = (expected.double() - found.double()).abs().max().item()
        return cls(apart, expected.double().abs().max().item())


def random_tokens(vocab_size: int, context: int, rows: int = 2) -> Tensor:
    """Tokens for a comparison, the same each time; at most 256 in a row."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (rows, min(context, 256)), generator=generator)


@torch.no_grad()
def compare(
    expected: Callable[[Tensor], Tensor],
    found: Callable[[Tensor], Tensor],
    vocab_size: int,
    context: int,
) -> Difference:
    """Compare logits on random tokens.

    Raises:
        CheckpointError: If they differ by more than ``LIMIT``.
    """
    tokens = random_tokens(vocab_size, context)
    difference = Difference.of(expected(tokens), found(tokens))
    check(difference)
    return difference


def check(difference: Difference) -> None:
    """Refuse a difference over ``LIMIT``, and one that is no number.

    Raises:
        CheckpointError: Naming both.
    """
    if not difference.largest <= LIMIT * difference.largest_logit:
        raise CheckpointError(
            f"The export differs from the student by {difference.largest:.2e} in a logit; the"
            f" largest logit is {difference.largest_logit:.2e}, and the limit {LIMIT:.0e} of it.",
            "Nothing was written. If the student's class overrides how it computes, export it with"
            " --format hf.",
        )
