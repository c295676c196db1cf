"""The built-in tokenizer: a byte-level BPE learnt from the training split alone.

Byte-level means that any text round-trips exactly and no unknown token exists. One special token,
``<|endoftext|>``, stands before and after documents and serves as bos and eos, as in GPT-2.
Read ``pretraining.py`` next.
"""

from collections.abc import Iterable
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT: Final = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, context_length: int
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer whose folder ``AutoTokenizer`` loads offline.

    Args:
        texts: Training documents. The same texts in the same order give the same tokenizer.
        vocab_size: Number of tokens, the 256 bytes and the special token included.
        context_length: Stored as ``model_max_length``, in tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> torch.Tensor:
    """Return all documents as one row of token ids, with the end-of-text token around each."""
    ids = [tokenizer.eos_token_id]
    for text in texts:
        # verbose=False: a document longer than the context is the normal case here.
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.long)
