"""A stream in passes: the windows of packing at once, from any pass on, and nothing more."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cleangpt.data import (
    DistillationDataCollator,
    TextDataset,
    load_texts,
    make_dataloader,
    streams,
    windows,
)
from cleangpt.data.streamed_windows import StreamedWindows
from cleangpt.data.streams import open_stream
from cleangpt.errors import InputError, UsageError
from tests.byte_tokenizer import make_tokenizer
from tests.unit.test_text_sources import write_jsonl

SIZE = 16


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(adds_bos=True, eos_token="<end>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    texts = [f"{'a b' * (index % 7)} {index}" * (index % 3) for index in range(300)]
    write_jsonl(folder / "train-0.jsonl", [{"text": text} for text in texts[:200]])
    write_jsonl(folder / "train-1.jsonl", [{"text": text} for text in texts[200:]])
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The tokens, packed at once."""
    return TextDataset(load_texts(str(folder)).texts, tokenizer, SIZE).tokens


@pytest.fixture(autouse=True)
def _few_rows_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places inside of files: at every seventh row."""
    monkeypatch.setattr(streams, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(windows, "_TEXTS_PER_CALL", 16)


def streamed(
    folder: Path, tokenizer: Any, tokens: int = 0, pass_tokens: int = 20 * SIZE
) -> StreamedWindows:
    return StreamedWindows(
        open_stream(str(folder)), tokenizer, SIZE, tokens=tokens, pass_tokens=pass_tokens
    )


def tokens_of(ours: StreamedWindows) -> Tensor:
    return torch.cat([ours[index]["input_ids"] for index in range(len(ours))])


def test_windows_are_those_of_packing_at_once(
    folder: Path, tokenizer: PreTrainedTokenizerFast, whole: Tensor
) -> None:
    full = len(whole) // SIZE * SIZE
    ours = streamed(folder, tokenizer, full, pass_tokens=full)
    assert (ours.passes, len(ours)) == (1, full // SIZE)
    assert torch.equal(tokens_of(ours), whole[:full])
    assert ours[-1]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError):
        ours[len(ours)]


def test_passes_follow_each_other_without_a_gap_and_in_any_order(
    folder: Path, tokenizer: PreTrainedTokenizerFast, whole: Tensor
) -> None:
    ours = streamed(folder, tokenizer, len(whole))
    size = ours.num_tokens
    assert ours.passes == -(-(len(whole) // SIZE) // 20) > 6
    assert len(whole) - ours.passes * size < (ours.passes + 1) * SIZE
    parts = [whole[index * size : (index + 1) * size] for index in range(ours.passes)]
    for index in [*range(ours.passes), 0, 1, 1, 5, 3]:
        ours.enter(index)
        assert torch.equal(tokens_of(ours), parts[index])
    # Another process goes on, twice; it never reads what lies before.
    state = json.loads(json.dumps(ours.state_dict()))
    for order in ([4, 5, 0], [ours.passes - 1, 0], [1]):
        other = streamed(folder, tokenizer, len(whole))
        assert other.fingerprint == ours.fingerprint
        other.load_state_dict(state)
        for index in order:
            other.enter(index)
            assert torch.equal(tokens_of(other), parts[index])
        state = json.loads(json.dumps(other.state_dict()))


def test_going_on_reads_nothing_before_the_pass(
    folder: Path, tokenizer: PreTrainedTokenizerFast, whole: Tensor
) -> None:
    ours = streamed(folder, tokenizer, len(whole))
    last = ours.passes - 1
    ours.enter(last)
    other = streamed(folder, tokenizer, len(whole))
    other.load_state_dict(ours.state_dict())
    # The last pass lies in the second file, so that the first is not even opened.
    parts = other.stream.parts
    object.__setattr__(other.stream, "parts", (None, *parts[1:]))
    other.enter(last)
    assert torch.equal(tokens_of(other), tokens_of(ours))


def test_a_wrong_place_is_found_out_and_the_stream_read_from_its_beginning(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    whole: Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours = streamed(folder, tokenizer, len(whole))
    ours.enter(3)
    expected, state = tokens_of(ours), ours.state_dict()
    state["3"]["start"] = state["2"]["start"]
    other = streamed(folder, tokenizer, len(whole))
    other.load_state_dict(state)
    other.enter(3)
    assert torch.equal(tokens_of(other), expected)
    assert "is read from its beginning to pass 3" in caplog.text
    state["3"]["checksum"] = "another"
    other = streamed(folder, tokenizer, len(whole))
    other.load_state_dict(state)
    with pytest.raises(InputError, match="pass 3 over .* has other tokens than before"):
        other.enter(3)


def test_a_stream_shorter_than_asked_for(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    whole: Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    full = len(whole) // SIZE
    # It ends in the first pass: that is all there is.
    ours = streamed(folder, tokenizer, 10 * len(whole), pass_tokens=5 * len(whole))
    assert (ours.passes, len(ours)) == (1, full)
    assert f"ends after {len(whole):,} tokens: {full} windows are all there is" in caplog.text
    # It ends in a later one, and begins anew, with what closes a document in between.
    end, again = [256], [*end_to_end(whole, 3)]
    stream = torch.tensor([*whole.tolist(), *end, *whole.tolist(), *end, *again])
    ours = streamed(folder, tokenizer, 2 * len(whole), pass_tokens=len(whole) // 2)
    assert ours.passes > 3
    for index in range(ours.passes):
        ours.enter(index)
        size = ours.num_tokens
        assert torch.equal(tokens_of(ours), stream[index * size : (index + 1) * size])
    assert caplog.text.count("begins anew") == 1
    assert f"--stream_tokens {len(whole)} is all of it" in caplog.text


def end_to_end(whole: Tensor, times: int) -> list[int]:
    return (whole.tolist() * times)[: len(whole)]


def test_less_than_a_window_is_refused(
    tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "short"}])
    with pytest.raises(InputError, match="has 6 tokens, fewer than one window of 16"):
        streamed(tmp_path, tokenizer)
    for numbers in ({"tokens": 7}, {"pass_tokens": 7}):
        with pytest.raises(UsageError, match="7 tokens of a stream are fewer than one window"):
            streamed(folder, tokenizer, **numbers)


def test_the_order_of_a_pass_is_a_function_of_the_epoch(
    folder: Path, tokenizer: PreTrainedTokenizerFast, whole: Tensor
) -> None:
    def epoch(ours: StreamedWindows, number: int) -> Tensor:
        loader: Any = make_dataloader(ours, DistillationDataCollator(tokenizer, SIZE), 8)
        loader.sampler.set_epoch(number)
        return torch.cat([batch["input_ids"] for batch in loader])

    ours = streamed(folder, tokenizer, len(whole))
    ours.enter(2)
    first, second = epoch(ours, 0), epoch(ours, 1)
    assert not torch.equal(first, second)
    other = streamed(folder, tokenizer, len(whole))
    other.enter(1)
    assert not torch.equal(epoch(other, 1), second)
    other.enter(2)
    assert torch.equal(epoch(other, 1), second)
    assert torch.equal(first.unique(dim=0), second.unique(dim=0))
    with pytest.raises(UsageError, match="workers would go on with the first pass"):
        make_dataloader(ours, DistillationDataCollator(tokenizer, SIZE), 8, num_workers=1)
