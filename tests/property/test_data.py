"""What packing, collating and ordering never change."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from cleangpt.data.batches import SeededSampler
from cleangpt.data.local_files import cut_into_documents
from cleangpt.data.text_sources import cut_splits
from cleangpt.data.windows import DistillationDataCollator, TextDataset
from tests.byte_tokenizer import END, make_tokenizer

TOKENIZER = make_tokenizer(eos_token="<end>", pad_token="<end>")
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8)
few = settings(max_examples=60, deadline=None)


@few
@given(TEXTS.filter(any), st.integers(1, 12))
def test_windows_joined_are_the_documents_with_eos_between(
    texts: list[str], block_size: int
) -> None:
    expected: list[int] = []
    for text in filter(None, texts):
        expected += [END] * bool(expected)
        expected += TOKENIZER(text, add_special_tokens=False, verbose=False).input_ids
    dataset = TextDataset(texts, TOKENIZER, block_size)
    items = [dataset[index]["input_ids"] for index in range(len(dataset))]
    assert torch.cat(items).tolist() == expected
    assert all(len(item) == block_size for item in items[:-1])
    assert 1 <= len(items[-1]) <= block_size


@few
@given(
    st.lists(st.lists(st.integers(0, 257), min_size=1, max_size=12), min_size=1, max_size=6),
    st.integers(1, 12),
)
def test_collator_keeps_every_id_and_masks_by_length(
    rows: list[list[int]], block_size: int
) -> None:
    collator = DistillationDataCollator(TOKENIZER, block_size)
    batch = collator([{"input_ids": torch.tensor(row)} for row in rows])
    longest = max(min(len(row), block_size) for row in rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), longest)
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        kept = row[:block_size]
        assert ids[: len(kept)].tolist() == kept
        assert mask.tolist() == [1] * len(kept) + [0] * (longest - len(kept))
        assert (ids[len(kept) :] == END).all()


@few
@given(st.integers(0, 200), st.integers(), st.integers(0, 1000))
def test_order_is_a_permutation_and_repeats(num_items: int, seed: int, epoch: int) -> None:
    first, second = SeededSampler(num_items, seed), SeededSampler(num_items, seed)
    second.set_epoch(epoch + 1)
    list(second)
    for sampler in (first, second):
        sampler.set_epoch(epoch)
    assert list(first) == list(second)
    assert sorted(first) == list(range(num_items))


@few
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=60))
def test_splits_share_no_document_and_lose_none(texts: list[str]) -> None:
    splits = cut_splits(texts)
    assert sorted(itertools.chain(*splits.values())) == sorted(texts)
    sets = [set(part) for part in splits.values()]
    assert sum(map(len, sets)) == len(set.union(*sets))
    if len(set(texts)) >= 3:
        assert all(splits.values())


@few
@given(st.text(st.sampled_from("ab \n\t"), max_size=3000))
def test_cutting_loses_nothing(text: str) -> None:
    assert "".join(cut_into_documents(text)) == text


@pytest.mark.parametrize("seed", [0, 1])
def test_orders_of_epochs_differ(seed: int) -> None:
    sampler = SeededSampler(30, seed)
    orders = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        orders.add(tuple(sampler))
    assert len(orders) == 20
