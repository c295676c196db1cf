"""Documents into windows of tokens, and windows into padded batches.

Documents are packed: their tokens stand one after the other with one end-of-sequence token between
them, and the stream is cut into windows of ``block_size`` tokens. Only the last window is shorter,
so hardly any position is padding. If that is not wanted, each document starts a window of its own.
The files here know nothing about models, shuffling or where the texts come from; read ``batches``
next, and ``token_cache`` for how a stream is kept on disk.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from cleangpt.data.overlap import overlap_sketch
from cleangpt.data.token_cache import TokenStream, cached_stream
from cleangpt.errors import InputError, UsageError

logger = logging.getLogger(__name__)

Call: TypeAlias = list[tuple[int, str]]
"""Pieces of text, each with the index of its document."""
PieceIds: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.int32]]"
TokenIds: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"

# A fast tokenizer spreads the texts of one call over all cores (RAYON_NUM_THREADS limits them), so
# a call holds many; its per-token records are an order of magnitude larger than the text, so not
# all. A piece is what one core works on. Slow tokenizers stay on one core: they are Python, and a
# library that starts processes breaks notebooks and scripts without a main guard.
_TEXTS_PER_CALL = 4096
_CHARACTERS_PER_CALL = 2_000_000
_CHARACTERS_PER_PIECE = 100_000

_PACKING_VERSION = 2
"""Part of every cache key: raise it whenever the same documents would give another stream."""

_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")
_LONGEST_LOOK_BACK = 1_000


def check_block_size(block_size: int) -> None:
    """Refuse windows without a token.

    Raises:
        UsageError: If ``block_size`` is not positive.
    """
    if block_size < 1:
        raise UsageError(
            f"block_size is {block_size}; a window holds at least one token.",
            "Set block_size (--block_size) to 1 or more, for example 128.",
        )


def _pieces(text: str) -> Iterator[str]:
    """Cut a huge document before a single space between words.

    A token starts there in any case for tokenizers that split at spaces first, as all byte-level
    ones do; at longer runs of spaces that depends on what follows.
    """
    start = 0
    while len(text) - start > _CHARACTERS_PER_PIECE:
        limit = start + _CHARACTERS_PER_PIECE
        look_from = max(start + 1, limit - _LONGEST_LOOK_BACK)
        spaces = [match.start() for match in _BETWEEN_WORDS.finditer(text, look_from, limit)]
        cut = spaces[-1] if spaces else text.rfind(" ", start + 1, limit)
        end = cut if cut > start else limit
        yield text[start:end]
        start = end
    yield text[start:]


def calls_of(texts: Iterable[str], limit: int) -> Iterator[Call]:
    """What the tokenizer gets at a time: pieces of documents, by number and by total length.

    Takes documents as it needs them, those of one call ahead.
    """
    group: Call = []
    size = 0
    for index, text in enumerate(texts):
        for piece in _pieces(text):
            group.append((index, piece))
            size += len(piece)
            if len(group) >= _TEXTS_PER_CALL or size >= limit:
                yield group
                group, size = [], 0
    if group:
        yield group


class Separators(NamedTuple):
    """Tokens around documents.

    Args:
        leading: What the tokenizer itself puts before a text: the bos of Llama and Gemma, or none.
        closing: What stands between two documents: eos, or nothing without one.
    """

    leading: list[int]
    closing: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Separators":
        """Those of a tokenizer."""
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        adds_bos = bos is not None and bos in tokenizer("").input_ids[:1]
        return cls([bos] if adds_bos else [], [] if eos is None else [int(eos)])


def pack_documents(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | Path | None = None,
) -> TokenStream:
    """Return the packed stream of token ids, and where in it each document starts.

    Between two documents stands one ``eos`` (nothing if the tokenizer has none); before each stands
    the ``bos`` of a tokenizer that adds one. Special tokens are otherwise not added.

    Args:
        texts: Documents. Those without a token are skipped.
        tokenizer: Any HuggingFace tokenizer.
        cache_dir: A folder where the stream of a long text is kept, and taken from the next time.
            None keeps nothing.
    """
    if cache_dir is None:
        return _tokenize(texts, tokenizer)
    leading, closing = Separators.of(tokenizer)
    return cached_stream(
        Path(cache_dir),
        texts,
        tokenizer,
        {"packing": _PACKING_VERSION, "leading": leading, "closing": closing},
        lambda: _tokenize(texts, tokenizer),
    )


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    chunks: list[TokenIds] = []
    starts: list[int] = []
    length = 0
    closing = Separators.of(tokenizer).closing
    last_document = -1
    calls = calls_of(texts, _CHARACTERS_PER_CALL)
    tokenized = ((call, tokens_of(call, tokenizer)) for call in calls)
    for document, ids in packed_chunks(tokenized, tokenizer):
        if document != last_document:
            starts.append(length + (len(closing) if starts else 0))
            last_document = document
        chunks.append(ids)
        length += len(ids)
    stream = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)
    return TokenStream(torch.from_numpy(stream), torch.tensor(starts, dtype=torch.int64))


def tokens_of(call: Call, tokenizer: PreTrainedTokenizerBase) -> list[PieceIds]:
    """The tokens of each piece of a call, int32."""
    # verbose=False silences "sequence longer than the maximum": windows are cut afterwards.
    encoded: list[list[int]] = tokenizer(
        [piece for _, piece in call],
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
    ).input_ids
    return [np.asarray(ids, dtype=np.int32) for ids in encoded]


def packed_chunks(
    calls: Iterable[tuple[Call, Sequence[PieceIds]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_first: bool = True,
) -> Iterator[tuple[int, TokenIds]]:
    """Yield tokens, int64, with the index of the document they are of; end to end, the packed ones.

    Args:
        calls: Calls in the order of their documents, each with the tokens of its pieces. Documents
            without a token give no chunk, huge ones several.
        tokenizer: Gives what stands between documents.
        is_first: Whether nothing stands before the first document that would have to be closed.
    """
    leading, closing = Separators.of(tokenizer)
    last_document = -1
    for call, tokens in calls:
        for (document, _), ids in zip(call, tokens, strict=True):
            if not len(ids):
                continue
            before: list[int] = []
            if document != last_document:
                before = [*([] if is_first else closing), *leading]
                last_document, is_first = document, False
            yield document, np.asarray([*before, *ids], dtype=np.int64)


def _edges(stream: TokenStream, block_size: int, packed: bool) -> Int[Tensor, " edges"]:
    """Where windows start, and where the last one ends; they follow each other without a gap."""
    total = stream.tokens.numel()
    end = torch.tensor([total])
    if packed:
        return torch.cat((torch.arange(0, total, block_size), end))
    lengths = torch.diff(stream.starts, append=end)
    counts = -(-lengths // block_size)  # windows of each document, the last one rounded up
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    within = torch.arange(int(counts.sum())) - first
    return torch.cat((stream.starts.repeat_interleave(counts) + within * block_size, end))


class TextDataset(Dataset[dict[str, Tensor]]):
    """Windows of ``block_size`` tokens cut from documents; end to end they are the whole stream.

    Args:
        texts: Documents, in the order in which they are packed.
        tokenizer: Any HuggingFace tokenizer; its ``eos`` separates the documents.
        block_size: Context length in tokens, >= 1.
        packed: True lets a window run over the end of a document into the next, so that only the
            last window is shorter. False starts each document in a window of its own: no window
            sees two documents, and the collator pads the last one of each.
        cache_dir: A folder where the tokens of a long text are kept, so that the next run need not
            tokenize; it may be deleted at any time. None keeps nothing.

    Attributes:
        tokens: The whole packed stream, one flat tensor of int64 ids.
        num_tokens: Its length.
        num_documents: Documents that gave at least one token.
        fingerprint: SHA-256 (hex) of the token ids, however they are cut into windows.

    Raises:
        UsageError: If ``block_size`` is not positive.
        InputError: If the texts give no token at all.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        packed: bool = True,
        cache_dir: str | Path | None = None,
    ) -> None:
        check_block_size(block_size)
        if isinstance(texts, str):
            raise InputError(
                "texts is one string; its characters would become the documents.",
                "Pass a list of documents, for example TextDataset([text], tokenizer, block_size).",
            )
        self.block_size = block_size
        stream = pack_documents(texts, tokenizer, cache_dir=cache_dir)
        self.tokens, self.num_documents = stream.tokens, stream.starts.numel()
        self.num_tokens = self.tokens.numel()
        if not self.num_tokens:
            raise InputError(
                f"{len(texts)} documents gave 0 tokens; one window holds {block_size}.",
                "Check the data set, its split and --dataset_text_column, or raise --max_samples.",
            )
        if packed and self.num_tokens < block_size:
            logger.warning(
                "%d tokens are fewer than one window of %d: the only window is that short",
                self.num_tokens,
                block_size,
            )
        self._edges = _edges(stream, block_size, packed)
        self.fingerprint = hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest()

    @cached_property
    def sketch(self) -> list[int]:
        """What tells later whether another text overlaps this one; see ``overlap``."""
        return overlap_sketch(self.tokens)

    @property
    def windows(self) -> tuple[Tensor, ...]:
        """All windows, as views of ``tokens``."""
        return self.tokens.split(self._edges.diff().tolist())

    def __len__(self) -> int:
        """Return the number of windows."""
        return self._edges.numel() - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return window ``index`` (negative counts from the end) as ``{"input_ids": ids}``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        start, end = self._edges[index : index + 2].tolist()
        return {"input_ids": self.tokens[start:end]}


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has neither a padding token nor an end-of-sequence token to pad with.",
            "Set one before the collator is made: tokenizer.pad_token = a token of its vocabulary.",
        )
    logger.info(
        "the tokenizer has no padding token; padding with its eos %r (id %d), which the attention "
        "mask hides",
        tokenizer.eos_token,
        tokenizer.eos_token_id,
    )
    return int(tokenizer.eos_token_id)


class DistillationDataCollator:
    """Items into one right-padded batch; the mask comes from lengths, never from token ids.

    GPT-2-like tokenizers have no padding token, and many set it to ``eos``, which also occurs in
    the text. A mask of ``ids == pad`` would hide real positions, so lengths decide.

    Args:
        tokenizer: Gives the padding id: ``pad``, or ``eos`` if it has none, which is logged.
        block_size: Items longer than this are cut, >= 1.

    Raises:
        UsageError: If ``block_size`` is not positive.
        InputError: If the tokenizer has neither token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        check_block_size(block_size)
        self.block_size = block_size
        # Only the id is kept, so worker processes do not carry (or warn about) the tokenizer.
        self.padding_id = _padding_id(tokenizer)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Int[Tensor, "batch seq"]]:
        """Return ``input_ids`` and ``attention_mask``, int64, padded to the longest item.

        Args:
            items: Each has ``"input_ids"``, a one-axis tensor or a list; other keys are ignored.
        """
        rows = [torch.as_tensor(item["input_ids"])[: self.block_size].long() for item in items]
        longest = max((row.numel() for row in rows), default=0)
        if rows and all(row.numel() == longest for row in rows):  # the usual case, twice as fast
            return {
                "input_ids": torch.stack(rows),
                "attention_mask": torch.ones((len(rows), longest), dtype=torch.int64),
            }
        input_ids = torch.full((len(rows), longest), self.padding_id, dtype=torch.int64)
        attention_mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        for index, row in enumerate(rows):
            input_ids[index, : row.numel()] = row
            attention_mask[index, : row.numel()] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}
