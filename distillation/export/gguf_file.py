"""A GPT-2 and its tokenizer as one GGUF file, which llama.cpp and what is built on it read.

The names of tensors are those of the package ``gguf``; matrices are turned round as llama.cpp's own
converter does. That converter takes tokenizers it has a checksum of; this one takes every
byte-level BPE whose text is split as GPT-2's or SmolLM's is.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cleangpt.errors import UsageError

FILE_NAME: Final = "student.gguf"
ARCHITECTURE: Final = "gpt2"
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
_KEPT_FP32 = "transformer.wpe.weight"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_REMEDY = "Use --format gpt2, and a tokenizer of your own with it."


def check_activation(config: Any) -> None:
    """Refuse an activation that llama.cpp's GPT-2 does not have.

    Raises:
        UsageError: Naming it.
    """
    if config.activation_function not in _TANH_GELU:
        raise UsageError(
            f"The student's activation is {config.activation_function!r}; llama.cpp's GPT-2 has"
            " the tanh form of GELU alone.",
            "Use --format gpt2 or onnx.",
        )


def write_gguf(gpt2: Any, tokenizer: Any, file: Path, stored: str = "F32") -> Path:
    """Write the file.

    Args:
        gpt2: A ``GPT2LMHeadModel``.
        tokenizer: A byte-level BPE tokenizer.
        file: Where to.
        stored: "F32", or "F16" for matrices; the table of positions and what is not a matrix stay
            F32, as in llama.cpp's converter.

    Raises:
        UsageError: If GGUF has no place for the activation or the tokenizer.
    """
    import gguf

    config = gpt2.config
    check_activation(config)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.ALL_F32 if stored == "F32" else kinds.MOSTLY_F16)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, values in named_tensors(gpt2, stored):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def named_tensors(gpt2: Any, stored: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """All tensors by their names in the file; a tied head is left out."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, gpt2.config.n_layer)
    for full_name, tensor in gpt2.state_dict().items():
        if full_name == "lm_head.weight" and gpt2.config.tie_word_embeddings:
            continue
        name, _, suffix = full_name.rpartition(".")
        values = tensor.float().cpu()
        values = values.T if full_name.endswith(_TRANSPOSED) else values
        if stored == "F16" and values.dim() == 2 and full_name != _KEPT_FP32:
            values = values.half()
        yield f"{names.get_name(name)}.{suffix}", np.ascontiguousarray(values.numpy())


@torch.no_grad()
def as_stored(gpt2: Any, stored: str) -> Any:
    """The model with its matrices rounded as the file stores them, in place."""
    if stored == "F16":
        for name, parameter in gpt2.named_parameters():
            if parameter.dim() == 2 and name != _KEPT_FP32:
                parameter.copy_(parameter.half().float())
    return gpt2


def pre_tokenizer_of(tokenizer: Any) -> str:
    """llama.cpp's name for how a tokenizer splits text before it looks for merges.

    Raises:
        UsageError: If it is not a byte-level BPE, or splits in another way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"{type(tokenizer).__name__} is not a fast tokenizer.", _REMEDY)
    plan = json.loads(backend.to_str())
    if plan["model"]["type"] != "BPE" or plan.get("normalizer"):
        raise UsageError(
            f"The tokenizer is a {plan['model']['type']}"
            f"{' with a normalizer' if plan.get('normalizer') else ''}; llama.cpp's GPT-2 reads"
            " byte-level BPE without one.",
            _REMEDY,
        )
    splits = plan.get("pre_tokenizer") or {}
    steps = splits.get("pretokenizers", [splits])
    last = steps[-1]
    plain = (
        last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
        and last.get("use_regex", True)
    )
    if plain and len(steps) == 1:
        return "gpt-2"
    if plain and steps[:-1] == [{"type": "Digits", "individual_digits": True}]:
        return "smollm"
    raise UsageError(
        f"The tokenizer splits text by {', '.join(str(step.get('type')) for step in steps)} in a"
        " way that is neither GPT-2's nor SmolLM's.",
        _REMEDY,
    )


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add vocabulary, merges and special tokens; rows beyond the tokens get placeholders.

    Args:
        writer: A ``gguf.GGUFWriter``.
        tokenizer: A byte-level BPE tokenizer.
        rows: Rows of the embedding.

    Raises:
        UsageError: If the tokenizer is of another kind, or has tokens without a row.
    """
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_of(tokenizer))
    by_row = {row: token for token, row in tokenizer.get_vocab().items()}
    if max(by_row, default=0) >= rows:
        raise UsageError(
            f"The tokenizer has a token {max(by_row)}, and the student {rows} rows.", _REMEDY
        )
    added = {row: token.special for row, token in tokenizer.added_tokens_decoder.items()}
    special = {
        *tokenizer.all_special_ids,
        *(row for row, is_special in added.items() if is_special),
    }
    types = [
        _UNUSED
        if row not in by_row
        else _CONTROL
        if row in special
        else _USER_DEFINED
        if row in added
        else _NORMAL
        for row in range(rows)
    ]
    writer.add_token_list([by_row.get(row, f"[PAD{row}]") for row in range(rows)])
    writer.add_token_types(types)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    if not merges:
        raise UsageError("The tokenizer merges nothing; a GGUF file holds no empty list.", _REMEDY)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    _add_special_ids(writer, tokenizer)


def _add_special_ids(writer: Any, tokenizer: Any) -> None:
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is not None:
        writer.add_eos_token_id(eos)
    if bos is not None or eos is not None:
        writer.add_bos_token_id(eos if bos is None else bos)
    if pad is not None or eos is not None:
        writer.add_pad_token_id(eos if pad is None else pad)
    writer.add_add_bos_token(bos is not None and bos in tokenizer("").input_ids[:1])
