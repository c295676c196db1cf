"""Properties of the students over random shapes, masks and chunks."""

from typing import Any

import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from tests.reference_students import KINDS, VOCAB, noisy_student

STUDENTS = {kind: noisy_student(kind) for kind in KINDS}
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}

kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**16)
masks = st.lists(
    st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3
)  # any pattern of padding, also in the middle and everywhere


def random_tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(kinds, seeds, st.integers(1, 12), st.integers(0, 11))
def test_no_position_sees_a_later_token(kind: str, seed: int, length: int, cut: int) -> None:
    student, ids = STUDENTS[kind], random_tokens(seed, 2, length)
    cut = min(cut, length - 1)
    changed = ids.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % VOCAB
    first, second = student(ids).logits, student(changed).logits
    torch.testing.assert_close(first[:, :cut], second[:, :cut], **TOLERANCE)
    assert not torch.allclose(first[:, cut], second[:, cut])


@settings(max_examples=25, deadline=None)
@given(kinds, seeds, masks)
def test_padding_anywhere_equals_the_tokens_alone(
    kind: str, seed: int, rows: list[list[bool]]
) -> None:
    student, mask = STUDENTS[kind], torch.tensor(rows)
    ids = random_tokens(seed, *mask.shape)
    logits = student(ids, attention_mask=mask.long()).logits
    assert logits.isfinite().all()
    for row, keep in zip(range(len(rows)), mask, strict=True):
        if keep.any():
            alone = student(ids[row : row + 1, keep]).logits[0]
            torch.testing.assert_close(logits[row, keep], alone, **TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(kinds, seeds, masks, st.lists(st.integers(1, 6), max_size=4))
def test_any_chunks_through_the_cache_equal_the_full_pass(
    kind: str, seed: int, rows: list[list[bool]], cuts: list[int]
) -> None:
    student, mask = STUDENTS[kind], torch.tensor(rows)
    ids = random_tokens(seed, *mask.shape)
    full = student(ids, attention_mask=mask.long()).logits
    cache, chunks, start = None, [], 0
    for stop in [*sorted(set(cuts)), 7]:
        seen = mask[:, :stop].long()
        output = student(ids[:, start:stop], seen, past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, stop
        chunks.append(output.logits)
    torch.testing.assert_close(torch.cat(chunks, dim=1)[mask], full[mask], **TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(kinds, seeds, st.permutations(range(4)))
def test_rows_of_a_batch_are_independent(kind: str, seed: int, order: list[int]) -> None:
    student, ids = STUDENTS[kind], random_tokens(seed, 4, 6)
    torch.testing.assert_close(student(ids[order]).logits, student(ids).logits[order])
