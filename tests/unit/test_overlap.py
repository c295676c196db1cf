"""What the overlap sketch says of two token streams."""

import json

import pytest
import torch
from torch import Tensor

from cleangpt.data import overlap
from cleangpt.data.overlap import NGRAM, SKETCH_SIZE, contained_share, overlap_sketch


def stream(length: int, seed: int) -> Tensor:
    return torch.randint(0, 50_000, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [NGRAM, 1000, 50_000])
def test_a_text_contains_itself_and_not_a_stranger(length: int) -> None:
    sketch = overlap_sketch(stream(length, 0))
    assert len(sketch) == min(length - NGRAM + 1, SKETCH_SIZE)
    assert contained_share(stream(length, 0), sketch) == 1.0
    assert contained_share(stream(length, 1), sketch) == 0.0
    assert json.loads(json.dumps(sketch)) == sketch
    assert max(sketch) < 2**53


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_shared_part_is_estimated(share: float) -> None:
    training = stream(200_000, 0)
    shared = int(share * 50_000)
    held_out = torch.cat([training[60_000 : 60_000 + shared], stream(50_000 - shared, 1)])
    assert contained_share(held_out, overlap_sketch(training)) == pytest.approx(share, abs=0.05)


def test_slices_do_not_change_the_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.cat([stream(20_000, 0), stream(20_000, 0)])  # repeats count once
    whole = overlap_sketch(tokens)
    monkeypatch.setattr(overlap, "_TOKENS_AT_ONCE", 777)
    assert overlap_sketch(tokens) == whole
    assert len(set(whole)) == SKETCH_SIZE
    assert contained_share(tokens, whole) == 1.0


def test_too_short_a_stream_cannot_be_compared() -> None:
    short = stream(NGRAM - 1, 0)
    assert overlap_sketch(short) == []
    assert contained_share(short, overlap_sketch(stream(1000, 0))) == 0.0
    assert contained_share(stream(1000, 0), []) == 0.0
