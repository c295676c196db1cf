"""Local folders with the names that the tutorial uses, so its code runs unchanged and offline.

HuggingFace resolves a folder of the working directory before any name on the hub: with a folder
``gpt2`` there, ``from_pretrained("gpt2")`` is the real call on a real, tiny model.
"""

import json
from pathlib import Path

STORIES = [
    f"Once upon a time, number {i}, a small fox found {i + 2} red apples under the old tree. "
    f"It gave {i % 3 + 1} to a friend, and they talked until the moon was high. The end."
    for i in range(48)
]


def save_tiny_gpt2(folder: Path, *, blocks: int = 3, positions: int = 128) -> None:
    """A GPT-2 of width 48 with a byte-level tokenizer, saved as the hub would hand it out."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|endoftext|>"])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token=end, eos_token=end, model_max_length=positions
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=positions,
        n_embd=48,
        n_layer=blocks,
        n_head=4,
        bos_token_id=len(alphabet),
        eos_token_id=len(alphabet),
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_stories(
    folder: Path, *, column: str = "text", extra_columns: tuple[str, ...] = ()
) -> None:
    """A data set folder with a train and a validation file."""
    folder.mkdir(parents=True)
    for split, texts in {"train": STORIES[:40], "validation": STORIES[40:]}.items():
        rows = [{column: text, **dict.fromkeys(extra_columns, text)} for text in texts]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
