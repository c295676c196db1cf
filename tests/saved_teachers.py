"""Tiny models of eight families, saved as the hub would hand them out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.byte_tokenizer import make_tokenizer

VOCAB = 258
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=256, eos_token_id=256,
    ),
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=16),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{key: SMALL[key] for key in SMALL if key != "num_key_value_heads"}
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2
    ),
}  # fmt: skip


def save(folder: Path, model: PreTrainedModel, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer(eos_token="<end>")).save_pretrained(folder)
    return str(folder)


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family]())
