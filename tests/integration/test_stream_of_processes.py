"""Processes that read a stream together: one reads, each tokenizes a part, all have the tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from cleangpt.data import StreamedWindows, open_stream, streamed_windows
from cleangpt.errors import InputError
from cleangpt.runtime.ranks import Ranks
from tests.byte_tokenizer import make_tokenizer

SIZE, PROCESSES = 16, 2
CHARACTERS = 400
"""To a call of the tokenizer, so that a pass takes several rounds of them."""


def write(folder: Path, last: str) -> None:
    """Three files of documents; of a damaged one only who reads on to it knows."""
    (folder / "train").mkdir(parents=True)
    for number in range(3):
        lines = [json.dumps({"text": f"{number} {i} " * (i % 9)}) for i in range(100)]
        (folder / "train" / f"{number}.jsonl").write_text("\n".join([*lines, last * (number == 2)]))


def passes(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """All passes, the second of them twice, as one process sees them."""
    streamed_windows._CHARACTERS_PER_CALL = CHARACTERS
    stream, tokenizer = open_stream(str(folder)), make_tokenizer()
    read: list[str] = []
    tokenized: list[int] = []
    documents = type(stream).documents
    tokens_of = streamed_windows.tokens_of

    def counted_documents(self: Any, place: Any = None) -> Any:
        for found, text in documents(self, place):
            read.append(text)
            yield found, text

    def counted_tokens(call: Any, own: Any) -> Any:
        tokenized.append(sum(len(piece) for _, piece in call))
        return tokens_of(call, own)

    type(stream).documents = counted_documents  # type: ignore[method-assign]
    streamed_windows.tokens_of = counted_tokens
    try:
        windows = StreamedWindows(
            stream, tokenizer, SIZE, tokens=240 * SIZE, pass_tokens=80 * SIZE, ranks=ranks
        )
        seen = []
        for index in (0, 1, 2, 1):
            windows.enter(index)
            seen.append(torch.stack([item["input_ids"] for item in windows]))
    except InputError as error:
        return {"refused": error.cause}
    finally:
        type(stream).documents = documents  # type: ignore[method-assign]
        streamed_windows.tokens_of = tokens_of
    places = json.dumps(windows.state_dict())
    return {"seen": seen, "places": places, "read": len(read), "tokenized": sum(tokenized)}


def process(rank: int, folder: Path) -> None:
    """One of the processes; leaves what it saw in a file."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    ranks = Ranks(rank, PROCESSES)
    found = {name: passes(folder / name, ranks) for name in ("whole", "damaged")}
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_each_tokenizes_its_part_and_all_have_the_tokens_of_one(tmp_path: Path) -> None:
    write(tmp_path / "whole", "")
    write(tmp_path / "damaged", '{"text": ')
    multiprocessing.spawn(process, (tmp_path,), PROCESSES)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    alone = passes(tmp_path / "whole", Ranks())
    total = sum(own["whole"]["tokenized"] for own in found)
    for own in (each["whole"] for each in found):
        for seen, expected in zip(own["seen"], alone["seen"], strict=True):
            assert torch.equal(seen, expected)
        assert own["places"] == alone["places"]
        assert own["tokenized"] == pytest.approx(total / PROCESSES, rel=0.2)
    assert [each["whole"]["read"] > 0 for each in found] == [True, False]
    # What the one that reads cannot read, all are told with the same words.
    refused = {each["damaged"]["refused"] for each in found}
    assert refused == {passes(tmp_path / "damaged", Ranks())["refused"]}
    assert "2.jsonl cannot be read" in refused.pop()
