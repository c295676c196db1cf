"""Documents into windows of tokens, and windows into padded batches.

Documents are packed: their tokens stand one after the other with one end-of-sequence token between
them, and the stream is cut into windows of ``block_size`` tokens. Only the last window is shorter,
so hardly any position is padding. The files here know nothing about models, shuffling or where the
texts come from; read ``batches`` next.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from cleangpt.data.overlap import overlap_sketch
from cleangpt.errors import InputError, UsageError

logger = logging.getLogger(__name__)

# Tokenizing in slices bounds the memory of the tokenizer's own per-token records, which are an
# order of magnitude larger than the text.
_TEXTS_PER_CALL = 256
_CHARACTERS_PER_PIECE = 500_000


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise UsageError(
            f"block_size is {block_size}; a window holds at least one token.",
            "Set block_size (--block_size) to 1 or more, for example 128.",
        )


def _pieces(text: str) -> Iterator[str]:
    """Cut a huge document before a space, where byte-level tokenizers start a token anyway."""
    start = 0
    while len(text) - start > _CHARACTERS_PER_PIECE:
        cut = text.rfind(" ", start + 1, start + _CHARACTERS_PER_PIECE)
        end = cut if cut > start else start + _CHARACTERS_PER_PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _batches_of_pieces(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Group (document index, piece) pairs, by number and by total length."""
    group: list[tuple[int, str]] = []
    size = 0
    for index, text in enumerate(texts):
        for piece in _pieces(text):
            group.append((index, piece))
            size += len(piece)
            if len(group) >= _TEXTS_PER_CALL or size >= _CHARACTERS_PER_PIECE:
                yield group
                group, size = [], 0
    if group:
        yield group


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer itself puts before a text: the bos of Llama and Gemma, or none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("").input_ids[:1] else []


def pack_documents(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Int[Tensor, " tokens"], int]:
    """Return the packed stream of token ids, and the number of documents that gave tokens.

    Between two documents stands one ``eos`` (nothing if the tokenizer has none); before each stands
    the ``bos`` of a tokenizer that adds one. Special tokens are otherwise not added.

    Args:
        texts: Documents. Those without a token are skipped.
        tokenizer: Any HuggingFace tokenizer.
    """
    leading = _leading_ids(tokenizer)
    eos = tokenizer.eos_token_id
    separator = ([] if eos is None else [eos]) + leading
    chunks: list[np.ndarray[Any, Any]] = []
    last_document = -1
    num_documents = 0
    for group in _batches_of_pieces(texts):
        # verbose=False silences "sequence longer than the maximum": windows are cut afterwards.
        encoded = tokenizer(
            [piece for _, piece in group],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        ).input_ids
        for (document, _), ids in zip(group, encoded, strict=True):
            if not ids:
                continue
            if document != last_document:
                prefix = separator if num_documents else leading
                chunks.append(np.asarray(prefix, dtype=np.int64))
                last_document = document
                num_documents += 1
            chunks.append(np.asarray(ids, dtype=np.int64))
    stream = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)
    return torch.from_numpy(stream), num_documents


class TextDataset(Dataset[dict[str, Tensor]]):
    """Windows of ``block_size`` tokens packed from documents; the last window may be shorter.

    Args:
        texts: Documents, in the order in which they are packed.
        tokenizer: Any HuggingFace tokenizer; its ``eos`` separates the documents.
        block_size: Context length in tokens, >= 1.

    Attributes:
        tokens: The whole packed stream, one flat tensor of int64 ids.
        num_tokens: Its length.
        num_documents: Documents that gave at least one token.
        fingerprint: SHA-256 (hex) of the token ids, whatever the block size.

    Raises:
        UsageError: If ``block_size`` is not positive.
        InputError: If the texts give no token at all.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int
    ) -> None:
        _check_block_size(block_size)
        if isinstance(texts, str):
            raise InputError(
                "texts is one string; its characters would become the documents.",
                "Pass a list of documents, for example TextDataset([text], tokenizer, block_size).",
            )
        self.block_size = block_size
        self.tokens, self.num_documents = pack_documents(texts, tokenizer)
        self.num_tokens = self.tokens.numel()
        if not self.num_tokens:
            raise InputError(
                f"{len(texts)} documents gave 0 tokens; one window holds {block_size}.",
                "Check the data set, its split and --dataset_text_column, or raise --max_samples.",
            )
        if self.num_tokens < block_size:
            logger.warning(
                "%d tokens are fewer than one window of %d: the only window is that short",
                self.num_tokens,
                block_size,
            )
        self.fingerprint = hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest()

    @cached_property
    def sketch(self) -> list[int]:
        """What tells later whether another text overlaps this one; see ``overlap``."""
        return overlap_sketch(self.tokens)

    @property
    def windows(self) -> tuple[Tensor, ...]:
        """All windows, as views of ``tokens``."""
        return self.tokens.split(self.block_size)

    def __len__(self) -> int:
        """Return the number of windows."""
        return math.ceil(self.num_tokens / self.block_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return window ``index`` (negative counts from the end) as ``{"input_ids": ids}``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = (index % len(self)) * self.block_size
        return {"input_ids": self.tokens[start : start + self.block_size]}


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
        _check_block_size(block_size)
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
        input_ids = torch.full((len(rows), longest), self.padding_id, dtype=torch.int64)
        attention_mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        for index, row in enumerate(rows):
            input_ids[index, : row.numel()] = row
            attention_mask[index, : row.numel()] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}
