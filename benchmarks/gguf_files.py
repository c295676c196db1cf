"""Tiny GGUF files of the architectures that transformers reads, written from random models.

The names of tensors are those of the package ``gguf``; what llama.cpp's converter does to values
(rows of queries and keys in another order, norms with one added, matrices turned round) is done
here too. ``teachers`` loads each file and compares logits with the model it was written from.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ARCHITECTURES: Final[dict[str, str]] = {
    "bloom": "bloom",
    "falcon": "falcon",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gpt-oss": "gpt_oss",
    "gpt2": "gpt2",
    "lfm2": "lfm2",
    "llama": "llama",
    "mamba": "mamba",
    "minimax-m2": "minimax_m2",
    "nemotron": "nemotron",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
    "qwen3moe": "qwen3_moe",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""What a file calls itself, and the family of transformers it is read as. ``deci`` has none."""

UNSTATED: Final[dict[str, dict[str, Any]]] = {
    "falcon": {"multi_query": True},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "phi3": {"sliding_window": None},
    "qwen2moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3": {"head_dim": 128},
    "qwen3moe": {"moe_intermediate_size": 768, "norm_topk_prob": True},
    "starcoder2": {"sliding_window": None},
}
"""Sizes that files state and transformers does not read, or none: it takes these."""

_MORE_NAMES: Final = {
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.e_score_correction_bias": "exp_probs_b.bias",
}
NOT_WRITTEN: Final = {
    "gemma4": "transformers takes the sizes of its largest tables for granted, 0.8 GB of them",
    "gpt-oss": "the layout of its experts is not written here",
    "qwen35": "the order of its value heads is not written here",
    "qwen35moe": "the order of its value heads is not written here",
}
"""Architectures whose files are left to others, and why."""
_TRANSPOSED = re.compile(r"attn_qkv\.weight|ffn_(up|down)\.weight|attn_output\.weight")
_PLUS_ONE = ("gemma2", "gemma3", "nemotron")


def write_gguf(
    model: Any, tokenizer: Any, file: Path, architecture: str, *, quantization: str = "F32"
) -> Path:
    """Write a model and its tokenizer as one GGUF file.

    Args:
        model: A causal LM of the architecture's family.
        tokenizer: A byte-level BPE tokenizer; Gemma's files get one of single characters.
        file: Where to.
        architecture: A key of ``ARCHITECTURES``.
        quantization: Of all matrices: F32, F16, or a name that ``gguf`` can quantise, as Q8_0.

    Returns:
        The file.
    """
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    for key, value in metadata(model.config, ARCHITECTURES[architecture]):
        add_value(writer, f"{architecture}.{key}", value)
    rows = len(model.get_input_embeddings().weight)
    if architecture.startswith("gemma"):
        add_sentencepiece(writer, rows)
    else:
        add_tokenizer(writer, tokenizer, rows)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, values in tensors(model, architecture):
        if values.ndim < 2 or quantization == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add one number of the model's shape."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, int(value))


def metadata(config: Any, family: str) -> Iterator[tuple[str, Any]]:
    """What the file says of the model's shape, by llama.cpp's names."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    rope = getattr(config, "rope_parameters", None) or {}
    known = GGUF_CONFIG_MAPPING.get(family.removesuffix("_text"), {})
    stated: dict[str, Any] = {}
    for key, field in known.items():
        field = "max_position_embeddings" if field == "n_ctx" else field
        value = rope.get(field) if field == "rope_theta" else getattr(config, field or "", None)
        if value is not None and not isinstance(value, str):
            stated[key] = value
    stated.update(hybrid_metadata(config, family))
    yield from stated.items()


def hybrid_metadata(config: Any, family: str) -> dict[str, Any]:
    """The same for families whose blocks are of two kinds, read by transformers' newer reader."""
    if family == "lfm2":
        kinds = config.layer_types
        kv_heads = config.num_key_value_heads
        return {
            "attention.head_count_kv": [kv_heads * (kind == "full_attention") for kind in kinds],
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        }
    return {}


def add_tokens(writer: Any, tokens: list[str], types: list[int], rows: int) -> None:
    """Add a vocabulary; rows beyond its tokens get placeholders, as llama.cpp's converter does."""
    beyond = range(len(tokens), rows)
    writer.add_token_list([*tokens, *(f"[PAD{row}]" for row in beyond)])
    writer.add_token_types([*types, *(5 for _ in beyond)])


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add vocabulary, merges and special tokens."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [token for token, _ in vocabulary]
    add_tokens(writer, tokens, [3 if token in special else 1 for token in tokens], rows)
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    # An array of nothing has no type, and the format no place for it.
    writer.add_token_merges(pairs or ["a b"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    writer.add_bos_token_id(tokenizer.eos_token_id if bos is None else bos)
    writer.add_pad_token_id(tokenizer.eos_token_id if pad is None else pad)


def add_sentencepiece(writer: Any, rows: int) -> None:
    """Add a vocabulary of bytes and letters in SentencePiece's form, as Gemma's files have it."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["\u2581", *map(chr, range(33, 127))]
    tokens = [*special, *pieces, *letters]
    writer.add_tokenizer_model("llama")
    writer.add_token_scores([-float(rank) for rank in range(rows)])
    types = [3] * len(special) + [6] * len(pieces) + [1] * len(letters)
    add_tokens(writer, tokens, types, rows)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)


def tensors(model: Any, architecture: str) -> Iterator[tuple[str, Array]]:
    """All tensors by their names in the file, as llama.cpp's converter leaves them."""
    import gguf

    config = model.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for full_name, tensor in model.state_dict().items():
        if full_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        name, _, suffix = full_name.rpartition(".")
        if suffix not in ("weight", "bias"):
            name, suffix = full_name, ""
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".layers.")[1].split(".")[0]
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                yield f"blk.{block}.ffn_{part}_exps.weight", np.ascontiguousarray(half)
            continue
        # Some are known by what their part of the model calls them.
        found = names.get_name(name) or names.get_name(name.partition(".")[2])
        named = f"{found}.{suffix or 'weight'}"
        for ending, other in _MORE_NAMES.items():
            if full_name.endswith(ending):
                named = f"blk.{full_name.split('.layers.')[1].split('.')[0]}.{other}"
        yield named, np.ascontiguousarray(converted(named, values, config, architecture))


def converted(name: str, values: Array, config: Any, architecture: str) -> Array:
    """The values of one tensor as the converter changes them."""
    if architecture == "llama" and re.search(r"attn_[qk]\.weight", name):
        heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
        return values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
    if architecture == "gpt2" and _TRANSPOSED.search(name):
        return values.T
    if architecture in _PLUS_ONE and name.endswith("norm.weight"):
        return values + 1
    if architecture == "bloom" and "attn_qkv" in name:
        return (
            values.reshape(config.n_head, 3, -1, *values.shape[1:])
            .swapaxes(0, 1)
            .reshape(values.shape)
        )
    if "shortconv.conv" in name or "ffn_gate_inp_shexp" in name:
        return values.squeeze()
    return values
