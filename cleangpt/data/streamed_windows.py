"""Windows of a stream of documents, a pass at a time, in memory that does not grow with the corpus.

The data are the first ``tokens`` of a stream, packed as ``windows.TextDataset`` packs them and cut
into full windows. They are gone through in *passes* of equal size: the tokens of one pass are in
memory, 4 bytes each, and all epochs of a stage are spent on one pass before the next is read. So
the order is a function of (seed, pass, epoch), a pass is shuffled as a whole, and frozen states are
kept for the windows of one pass: a pass is as large as what the byte budget for them holds.

What that costs, in forwards through one block, for each window and a student block k (counted from
0) taught by teacher block k for E epochs, besides the E training steps: where all windows fit, and
so there is one pass, 1 of the teacher and 1 of the student, as each block moves the kept states on
by one. With P passes the states of a new pass are computed from its tokens, k + 1 and k, once and
not E times; but for one pass in P: a stage begins with the pass that the one before ended with,
whose states are there. Over L blocks a window costs 2 L forwards with one pass and about L^2 with
many. The schedule ``parallel_local`` costs L + L for any number of passes: choose it for a corpus
much larger than the budget.

The processes of a run read together: the first one reads the documents, each tokenizes its part of
them, and all have the tokens of the pass, of which each computes its rows of every batch. So the
losses are those of one process. The trainer writes down where each pass begins and a checksum of
its tokens (:meth:`StreamedWindows.state_dict`); a run that goes on reads from there, with any
number of processes, and data that have changed are found out. Without that the stream is read from
its beginning.

A stream that ends within the first pass is taken as it is; one that ends later begins anew, because
the number of steps is fixed by then. Either is said.
"""

import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from cleangpt.data.overlap import overlap_sketch
from cleangpt.data.streams import StreamPosition, TextStream
from cleangpt.data.windows import (
    Call,
    PieceIds,
    calls_of,
    check_block_size,
    packed_chunks,
    tokens_of,
)
from cleangpt.errors import CleanGPTError, InputError, UsageError
from cleangpt.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

PASS_TOKENS = 2**22
"""Tokens of a pass where no byte budget for frozen states says how many: 16 MiB of ids."""

_CHARACTERS_PER_CALL = 250_000
"""A tokenizer's records of its tokens are an order of magnitude larger than the text."""

Ids: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[Any]]"


@dataclass(frozen=True)
class Mark:
    """A token of the packed stream.

    Args:
        place: The document it is of; None is the first one.
        offset: Tokens of that document before it, those of separators included.
        is_first: Whether nothing stands before the document.
    """

    place: StreamPosition | None = None
    offset: int = 0
    is_first: bool = True


class _Reader:
    """Packed tokens from a mark on.

    Process 0 reads. What it has read goes round, a call of the tokenizer for each process, and what
    each has made of its own goes to all.
    """

    def __init__(
        self, stream: TextStream, tokenizer: PreTrainedTokenizerBase, mark: Mark, ranks: Ranks
    ) -> None:
        self.mark = replace(mark, offset=0)
        self._ahead: deque[StreamPosition] = deque()  # documents taken and not yet tokenized
        self._document = 0  # the number of the first of them
        tokenized = self._tokenized(stream, tokenizer, mark.place, ranks)
        self._chunks = packed_chunks(tokenized, tokenizer, is_first=mark.is_first)
        self._rest: Ids = np.empty(0, dtype=np.int64)
        left = mark.offset
        while left:
            left -= self.fill(np.empty(min(left, PASS_TOKENS), dtype=np.int32)) or left

    def fill(self, room: Ids) -> int:
        """Write the next tokens; return how many, fewer than there is room for only at the end."""
        done = 0
        while done < len(room):
            if not len(self._rest) and not self._next_chunk():
                break
            taken = self._rest[: len(room) - done]
            room[done : done + len(taken)] = taken
            self._rest = self._rest[len(taken) :]
            self.mark = replace(self.mark, offset=self.mark.offset + len(taken))
            done += len(taken)
        return done

    def _next_chunk(self) -> bool:
        document, self._rest = next(self._chunks, (-1, self._rest))
        if document < 0:
            return False
        while self._document < document:
            self._ahead.popleft()
            self._document += 1
        if self.mark.place != self._ahead[0]:
            self.mark = Mark(self._ahead[0], 0, self.mark.is_first and not self.mark.offset)
        return True

    def _tokenized(
        self,
        stream: TextStream,
        tokenizer: PreTrainedTokenizerBase,
        place: StreamPosition | None,
        ranks: Ranks,
    ) -> Iterator[tuple[Call, list[PieceIds]]]:
        """Calls of the tokenizer in order, with the tokens of their pieces."""
        places: list[StreamPosition] = []

        def texts() -> Iterator[str]:
            for found, text in stream.documents(place):
                places.append(found)
                yield text

        calls = calls_of(texts(), _CHARACTERS_PER_CALL)

        def read() -> tuple[list[Call], list[StreamPosition]]:
            places.clear()
            return list(islice(calls, ranks.count)), places

        while True:
            found, new = ranks.done_by_main(read)
            if not found:
                return
            self._ahead.extend(new)
            own = tokens_of(found[ranks.index], tokenizer) if ranks.index < len(found) else []
            yield from zip(found, ranks.gathered(own), strict=False)


class StreamedWindows(Dataset[dict[str, Tensor]]):
    """The windows of one pass over a stream, and the way to the next pass.

    Made with ``make_dataloader`` into a loader, and given to a trainer, which enters the passes.

    Args:
        stream: The documents.
        tokenizer: Any HuggingFace tokenizer; its ``eos`` separates the documents.
        block_size: Context length in tokens, >= 1; every window is full.
        tokens: Tokens of the stream to use, in all passes together; 0 is one pass.
        pass_tokens: Tokens of a pass, at most.
        ranks: The processes that read together: all must enter the same passes at the same time.
            None reads alone.

    Attributes:
        passes: How many passes there are, all of as many windows.
        num_tokens: Tokens of one pass.
        entered: The pass whose windows these are; None if reading one was broken off.
        fingerprint: SHA-256 (hex) of what the stream is and of the tokens of its first pass.

    Raises:
        UsageError: If a number is too small for one window.
        InputError: If the stream does not fill one window.
    """

    def __init__(
        self,
        stream: TextStream,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        tokens: int = 0,
        pass_tokens: int = PASS_TOKENS,
        ranks: Ranks | None = None,
    ) -> None:
        check_block_size(block_size)
        for number in (pass_tokens, tokens or block_size):
            if number < block_size:
                raise UsageError(
                    f"{number} tokens of a stream are fewer than one window of {block_size}.",
                    "Raise --stream_tokens (or --activation_cache_gb), or lower --block_size.",
                )
        self.stream = stream
        self.block_size = block_size
        self._tokenizer = tokenizer
        self._ranks = ranks or Ranks()
        per_pass = pass_tokens // block_size
        wanted = tokens // block_size or per_pass
        self.passes = math.ceil(wanted / per_pass)
        self._tokens: Ids = np.empty(wanted // self.passes * block_size, dtype=np.int32)
        self._reader = self._reading(Mark())
        self._starts: dict[int, Mark] = {}
        self._checksums: dict[int, str] = {}
        self._warned = False
        self.entered: int | None = 0
        self._read_first(tokens)
        about = [stream.identity, block_size, len(self), self.passes]
        digest = hashlib.sha256(json.dumps(about).encode())
        digest.update(self._tokens.tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def num_tokens(self) -> int:
        """Tokens of one pass."""
        return len(self._tokens)

    @cached_property
    def sketch(self) -> list[int]:
        """What tells later whether another text overlaps the first pass; see ``overlap``."""
        self.enter(0)
        return overlap_sketch(torch.from_numpy(self._tokens))

    def __len__(self) -> int:
        """Return the number of windows of a pass."""
        return len(self._tokens) // self.block_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return window ``index`` of the pass as ``{"input_ids": ids}``, int64."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index % len(self) * self.block_size
        return {"input_ids": torch.from_numpy(self._tokens[start : start + self.block_size]).long()}

    def enter(self, index: int) -> None:
        """Read the windows of pass ``index``, in the place of those that were here.

        Raises:
            InputError: If they are not what they were, or the stream cannot be read.
        """
        if index == self.entered:
            return
        if self.entered is not None and index == self.entered + 1 and self._read(index):
            return
        known = max(each for each in self._starts if each <= index)
        if known and self._read_to(index, known):
            return
        if known:
            # `datasets` before 5.2 gave places that were none, after a run had gone on.
            logger.warning("%s is read from its beginning to pass %d", self.stream.name, index)
        if not self._read_to(index, 0):
            raise InputError(
                f"pass {index} over {self.stream.name} has other tokens than before.",
                "Bring the data back as they were, or start again with --overwrite.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the passes read so far begin, and checksums of their tokens; JSON keeps it."""
        return {
            str(index): {"start": asdict(self._starts[index]), "checksum": checksum}
            for index, checksum in self._checksums.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, for data of the same fingerprint."""
        for name, known in state.items():
            start = dict(known["start"])
            start["place"] = start["place"] and StreamPosition(*start["place"])
            self._starts.setdefault(int(name), Mark(**start))
            self._checksums.setdefault(int(name), str(known["checksum"]))

    def _reading(self, mark: Mark) -> _Reader:
        return _Reader(self.stream, self._tokenizer, mark, self._ranks)

    def _read_first(self, tokens: int) -> None:
        self._starts[0] = self._reader.mark
        found = self._reader.fill(self._tokens)
        if found < len(self._tokens):
            self.passes = 1
            self._tokens = self._tokens[: found // self.block_size * self.block_size].copy()
            if not len(self._tokens):
                raise InputError(
                    f"{self.stream.name} has {found} tokens, fewer than one window of"
                    f" {self.block_size}.",
                    "Give it more text, or lower --block_size.",
                )
            logger.log(
                logging.WARNING if tokens else logging.INFO,
                "%s ends after %s tokens: %d windows are all there is",
                *(self.stream.name, f"{found:,}", len(self)),
            )
        self._checksums[0] = _checksum(self._tokens)

    def _read_to(self, index: int, start: int) -> bool:
        """Read on from where pass ``start`` begins; return whether all is as it was."""
        try:
            self._reader = self._reading(self._starts[start])
            return all(self._read(each) for each in range(start, index + 1))
        except CleanGPTError:
            if start == 0:
                raise
            return False  # another version of `datasets` may not know the place

    def _read(self, index: int) -> bool:
        """Read the pass that follows the one before; return whether it is as it was."""
        self.entered = None
        self._starts[index] = self._reader.mark
        done = self._reader.fill(self._tokens)
        while done < len(self._tokens):
            if not self._warned:
                self._warned = True
                logger.warning(
                    "%s ends in pass %d of %d and begins anew; --stream_tokens %d is all of it",
                    *(self.stream.name, index + 1, self.passes, index * self.num_tokens + done),
                )
            self._reader = self._reading(Mark(is_first=False))
            more = self._reader.fill(self._tokens[done:])
            if not more:
                return False
            done += more
        found = _checksum(self._tokens)
        if self._checksums.setdefault(index, found) == found:
            self.entered = index
        return self.entered == index


def _checksum(tokens: Any) -> str:
    """XXH3-128 of an array's numbers."""
    return str(xxhash.xxh3_128_hexdigest(tokens))
