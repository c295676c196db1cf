"""Tiny models and batches, built from configurations. The only builders of the suite."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

VOCAB = 67
CONTEXT = 32
BLOCKS = 3
WIDTH = 32

FAMILIES = ("gpt2", "llama", "qwen3", "opt", "gpt_neox", "gemma3", "bloom", "mistral")
STUDENTS = ("Vanilla", "Factored", "SASP")
VANILLA_FIRST: list[Any] = [
    "Vanilla",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Factored", "SASP")),
]
"""All kinds as parameters of a test that takes seconds for each."""

LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCAB,
        "n_positions": CONTEXT,
        "n_embd": WIDTH,
        "n_layer": BLOCKS,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "sliding_window": 16},
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "gemma3_text": {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 8},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 64,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "gpt_neox": {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "bloom": {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": 4},
}


def tiny_teacher(
    family: str = "gpt2",
    seed: int = 0,
    *,
    config_fields: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A random teacher of a HuggingFace family: 3 blocks of width 32, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = "gemma3_text" if family == "gemma3" else family
    config = AutoConfig.for_model(
        model_type, **{**(config_fields or _CONFIGS[model_type]), **changes}
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # the tiny initial weights of some families make all states alike
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    return model.eval()


def tiny_student(kind: str = "Vanilla", seed: int = 1, **changes: Any) -> Any:
    """A student of the registry: by default 2 blocks of width 16."""
    from config_distillation import GPTConfig
    from model import get_model_class

    fields = {
        "block_size": CONTEXT,
        "vocab_size": VOCAB,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "dropout": 0.0,
        "model_type": kind,
        **changes,
    }
    torch.manual_seed(seed)
    return get_model_class(kind)(config=GPTConfig(**fields))


def batches(
    count: int = 4, batch_size: int = 4, seq_len: int = 12, seed: int = 2
) -> list[dict[str, Tensor]]:
    """Random token batches without padding; a list is a loader with a length."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, seq_len)
    return [
        {
            "input_ids": torch.randint(1, VOCAB, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        for _ in range(count)
    ]


def padded(batch: dict[str, Tensor], extra: int, side: str = "right") -> dict[str, Tensor]:
    """The same batch with ``extra`` padding positions that hold arbitrary tokens."""
    rows = batch["input_ids"].shape[0]
    junk = torch.full((rows, extra), 5, dtype=torch.long)
    none = torch.zeros((rows, extra), dtype=torch.long)
    parts = {
        "input_ids": (junk, batch["input_ids"]),
        "attention_mask": (none, batch["attention_mask"]),
    }
    order = slice(None) if side == "left" else slice(None, None, -1)
    return {name: torch.cat(pair[order], dim=1) for name, pair in parts.items()}


def weights_of(model: Any) -> dict[str, Tensor]:
    """A copy of all tensors of a model."""
    return copy.deepcopy(model.state_dict())


def unchanged(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are equal bit for bit."""
    return {name for name in before if torch.equal(before[name], after[name])}


def backbone_trainer(
    output_dir: Path, student: Any = None, data: Any = None, **options: Any
) -> Any:
    """A backbone trainer for a tiny teacher (``family``), student and list of batches."""
    from distillation.trainers import BackboneDistillationTrainer

    return BackboneDistillationTrainer(
        tiny_teacher(options.pop("family", "gpt2")),
        tiny_student() if student is None else student,
        None,
        batches() if data is None else data,
        output_dir=output_dir / "run",
        **options,
    )
