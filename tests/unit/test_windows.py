"""Packing into windows, and the collator's mask."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from cleangpt.data import windows
from cleangpt.data.windows import DistillationDataCollator, TextDataset
from cleangpt.errors import InputError, UsageError
from tests.builders import tiny_student, tiny_teacher
from tests.byte_tokenizer import END, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(eos_token="<end>")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def test_documents_are_packed_with_eos_between(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = TextDataset(["abc", "", "defg"], tokenizer, block_size=3)
    stream = [*ids_of(tokenizer, "abc"), END, *ids_of(tokenizer, "defg")]
    assert dataset.tokens.tolist() == stream
    assert dataset.tokens.dtype == torch.int64
    assert dataset.num_tokens == 8
    assert dataset.num_documents == 2
    assert [len(window) for window in dataset.windows] == [3, 3, 2]
    assert len(dataset) == 3
    assert dataset[-1]["input_ids"].tolist() == stream[6:]
    assert [item["input_ids"].tolist() for item in dataset] == [w.tolist() for w in dataset.windows]
    with pytest.raises(IndexError):
        dataset[3]


def test_bos_of_the_tokenizer_stands_before_every_document() -> None:
    tokenizer = make_tokenizer(adds_bos=True, eos_token="<end>")
    assert TextDataset(["a", "b"], tokenizer, 16).tokens.tolist() == [
        257, *ids_of(tokenizer, "a"), 256, 257, *ids_of(tokenizer, "b"),
    ]  # fmt: skip


def test_without_eos_documents_touch() -> None:
    tokenizer = make_tokenizer()
    assert TextDataset(["a", "b"], tokenizer, 16).tokens.tolist() == ids_of(tokenizer, "ab")


def test_huge_documents_are_tokenized_in_pieces(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["one two three four " * 5, "x" * 45, "end"]
    whole = TextDataset(texts, tokenizer, 8).tokens
    monkeypatch.setattr(windows, "_CHARACTERS_PER_PIECE", 16)
    monkeypatch.setattr(windows, "_TEXTS_PER_CALL", 2)
    assert torch.equal(TextDataset(texts, tokenizer, 8).tokens, whole)
    monkeypatch.setattr(windows, "_TEXTS_PER_CALL", 100)
    monkeypatch.setattr(windows, "_CHARACTERS_PER_CALL", 20)
    assert torch.equal(TextDataset(texts, tokenizer, 8).tokens, whole)


def test_a_cut_between_pieces_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in code, where a cut inside a run of spaces would: GPT-2's rule splits those in two."""
    teacher_like = load_builtin_tokenizer()
    text = "def f(x):\n    if x:\n        return  x   +  1\n\n" * 40 + "word\nby\nline " * 30
    whole = TextDataset([text], teacher_like, 8).tokens
    for size in range(90, 110):
        monkeypatch.setattr(windows, "_CHARACTERS_PER_PIECE", size)
        assert torch.equal(TextDataset([text], teacher_like, 8).tokens, whole)


def test_one_call_holds_enough_for_many_cores() -> None:
    """Of a huge document too: a call with two pieces of it leaves all cores but two idle."""
    limit = windows._CHARACTERS_PER_CALL
    many = [len(group) for group in windows.calls_of(["a word " * 300] * 5_000, limit)]
    huge = [len(group) for group in windows.calls_of(["a word " * 1_500_000], limit)]
    assert min(many[:-1]) > 500
    assert min(huge[:-1]) >= 20


def load_builtin_tokenizer() -> Any:
    from cleangpt.teacher import load_teacher

    return load_teacher("builtin").tokenizer


def test_unpacked_documents_start_windows_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["abc", "", "defgh", "ij"]
    packed, own = (TextDataset(texts, tokenizer, 4, packed=each) for each in (True, False))
    assert [tokenizer.decode(window) for window in own.windows] == [
        "abc<end>", "defg", "h<end>", "ij",
    ]  # fmt: skip
    assert len(own) == 4
    assert [item["input_ids"].tolist() for item in own] == [w.tolist() for w in own.windows]
    assert own[-1]["input_ids"].tolist() == own[3]["input_ids"].tolist()
    assert torch.equal(torch.cat(own.windows), packed.tokens)
    assert own.fingerprint == packed.fingerprint
    assert own.num_documents == packed.num_documents == 3


def test_unpacked_documents_keep_their_bos() -> None:
    tokenizer = make_tokenizer(adds_bos=True, eos_token="<end>")
    windows_of = TextDataset(["a", "b"], tokenizer, 16, packed=False).windows
    assert [tokenizer.decode(window) for window in windows_of] == ["<start>a<end>", "<start>b"]


@pytest.mark.parametrize("texts", [["one document of some length"], ["abc", "ten bytes!!", "xyz"]])
def test_packed_and_unpacked_agree_where_documents_fill_windows(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    packed, own = (TextDataset(texts, tokenizer, 4, packed=each) for each in (True, False))
    assert [w.tolist() for w in packed.windows] == [w.tolist() for w in own.windows]


def losses_of(tmp_path: Path, dataset: TextDataset, collator: Any, batch_size: int) -> list[float]:
    """The losses of the blocks after a few passes, one optimizer step a pass."""
    from distillation.trainers import BackboneDistillationTrainer

    trainer = BackboneDistillationTrainer(
        tiny_teacher("gpt2", vocab_size=258),
        tiny_student(vocab_size=258),
        None,
        DataLoader(dataset, batch_size=batch_size, collate_fn=collator),
        output_dir=tmp_path,
        gradient_accumulation_steps=-(-len(dataset) // batch_size),
        overwrite=True,
    )
    return list(trainer.train_backbone(3, 1e-2)["backbone_losses"])


def test_a_run_is_the_same_packed_unpacked_and_padded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    collator = DistillationDataCollator(tokenizer, 8)
    one = [
        TextDataset(["one document of some length"], tokenizer, 8, packed=p) for p in (True, False)
    ]
    packed, own = (losses_of(tmp_path, dataset, collator, 4) for dataset in one)
    assert packed == own
    several = TextDataset(
        ["abc", "seven b", "a document of two windows"], tokenizer, 8, packed=False
    )
    assert len({len(window) for window in several.windows}) > 2
    # Four rows a batch are padded to the longest, one row a batch is not padded at all.
    for dataset in (*one, several):
        padded, plain = (losses_of(tmp_path, dataset, collator, size) for size in (4, 1))
        assert padded == pytest.approx(plain, rel=1e-5)


def test_fingerprint_is_of_the_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    one = TextDataset(["abc", "d"], tokenizer, 3)
    assert one.fingerprint == TextDataset(["abc", "d"], tokenizer, 5).fingerprint
    assert one.fingerprint != TextDataset(["abd", "d"], tokenizer, 3).fingerprint
    assert len(one.fingerprint) == 64


def test_no_length_warning(
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.WARNING):
        TextDataset(["longer than the eight tokens of this tokenizer"], tokenizer, 8)
    assert "longer" not in caplog.text + capfd.readouterr().err


def test_less_than_one_window_gives_one_short_window(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="cleangpt.data.windows"):
        dataset = TextDataset(["abc"], tokenizer, 128)
    assert [len(window) for window in dataset.windows] == [3]
    assert "3 tokens are fewer than one window of 128" in caplog.text


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_tokens_is_an_input_error(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    with pytest.raises(InputError, match=r"gave 0 tokens; one window holds 128.\n.*--max_samples"):
        TextDataset(texts, tokenizer, 128)


def test_one_string_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"one string.*\n.*list of documents"):
        TextDataset("abc", tokenizer, 128)


def test_block_size_must_be_positive(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match=r"block_size is 0.*\n.*--block_size"):
        TextDataset(["a"], tokenizer, 0)
    with pytest.raises(UsageError, match="block_size is 0"):
        DistillationDataCollator(tokenizer, 0)


@pytest.mark.parametrize(
    ("special", "padding"),
    [
        ({"eos_token": "<end>"}, 256),
        ({"eos_token": "<end>", "pad_token": "<end>"}, 256),
        ({"eos_token": "<end>", "pad_token": "<start>"}, 257),
        ({"pad_token": "<start>"}, 257),
    ],
)
def test_collator_pads_right_and_masks_by_length(special: dict[str, str], padding: int) -> None:
    collator = DistillationDataCollator(make_tokenizer(**special), block_size=4)
    batch = collator(
        [{"input_ids": torch.tensor([padding, 7])}, {"input_ids": [1, 2, 3, padding, 9], "x": "y"}]
    )
    assert batch["input_ids"].tolist() == [[padding, 7, padding, padding], [1, 2, 3, padding]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_what_pads_instead_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cleangpt.data.windows"):
        DistillationDataCollator(make_tokenizer(eos_token="<end>", pad_token="<start>"), 4)
        assert caplog.messages == []
        collator = DistillationDataCollator(make_tokenizer(eos_token="<end>"), 4)
        collator([{"input_ids": [1]}])
        collator([{"input_ids": [1]}])
    assert caplog.messages == [
        "the tokenizer has no padding token; padding with its eos '<end>' (id 256), which the "
        "attention mask hides"
    ]


def test_nothing_to_pad_with_is_refused() -> None:
    with pytest.raises(InputError, match=r"neither a padding token nor.*\n.*tokenizer\.pad_token"):
        DistillationDataCollator(make_tokenizer(), 4)


def test_the_tutorials_loader(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = TextDataset(["some text"] * 10, tokenizer, block_size=16)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=4,
        collate_fn=DistillationDataCollator(tokenizer, block_size=16),
        shuffle=True,
    )
    assert sum(int(batch["attention_mask"].sum()) for batch in loader) == dataset.num_tokens
