"""How much of one text also stands in another, from a few thousand numbers.

Every run of ``NGRAM`` tokens gets a hash, and a text's sketch is its smallest distinct hashes (the
bottom-k sketch of Broder 1997, "On the resemblance and containment of documents"). A hash below the
sketch's largest is in the text exactly if it is in the sketch, so the share of another text's small
hashes found there estimates how much of that text it contains. Runs of 13 tokens and more are what
test-set contamination is commonly measured by (Brown et al. 2020, arXiv:2005.14165, appendix C).
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Int
from torch import Tensor

NGRAM = 16
SKETCH_SIZE = 2048
OVERLAP_WORTH_A_WARNING = 0.02
"""Quotations and boilerplate stay below it; a shared document does not."""

Hashes: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]"

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_TOKENS_AT_ONCE = 1_000_000


def overlap_sketch(tokens: Int[Tensor, " tokens"]) -> list[int]:
    """Return the smallest hashes of a token stream, ascending; all of them if they are few."""
    smallest = np.empty(0, dtype=np.uint64)
    for hashes in _ngram_hashes(tokens):
        if len(smallest) == SKETCH_SIZE:
            hashes = hashes[hashes < smallest[-1]]
        smallest = np.unique(np.concatenate((smallest, hashes)))[:SKETCH_SIZE]
    return [int(value) for value in smallest]


def contained_share(tokens: Int[Tensor, " tokens"], sketch: Sequence[int]) -> float:
    """Estimate the share of a stream's distinct n-grams that the sketched stream also has.

    0.0 if nothing can be compared: either stream is shorter than one n-gram.
    """
    known = np.asarray(sketch, dtype=np.uint64)
    # A sketch that is not full holds every hash there is.
    limit = known.max() if len(known) == SKETCH_SIZE else np.iinfo(np.uint64).max
    small = [hashes[hashes <= limit] for hashes in _ngram_hashes(tokens)]
    distinct = np.unique(np.concatenate(small)) if small else np.empty(0, dtype=np.uint64)
    return float(np.isin(distinct, known).mean()) if len(distinct) else 0.0


def _ngram_hashes(tokens: Int[Tensor, " tokens"]) -> Iterator[Hashes]:
    """The hashes of all n-grams in order, some at a time; below 2^53, which JSON keeps exact."""
    for start in range(0, tokens.numel() - NGRAM + 1, _TOKENS_AT_ONCE):
        ids = tokens[start : start + _TOKENS_AT_ONCE + NGRAM - 1].numpy().astype(np.uint64)
        count = len(ids) - NGRAM + 1
        hashes = np.zeros(count, dtype=np.uint64)
        for offset in range(NGRAM):
            hashes = (hashes + ids[offset : offset + count] + np.uint64(1)) * _MULTIPLIER
        yield ((hashes ^ (hashes >> np.uint64(29))) * _MIX) >> np.uint64(11)
