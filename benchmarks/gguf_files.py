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
    "gemma4": {
        "head_dim": 256,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262_144,
    },
    "gpt-oss": {"head_dim": 64},
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
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
}
_TRANSPOSED = re.compile(r"attn_qkv\.weight|ffn_(up|down)\.weight|attn_output\.weight")
_PLUS_ONE = ("gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe")
_VALUE_HEADS = re.compile(r"attn_(qkv|gate)\.|ssm_(alpha|beta|conv1d|out|a$|dt)")
_GPT_OSS_NAMES: Final = {
    "self_attn.sinks": ("attn_sinks.weight", None, False),
    "mlp.router.weight": ("ffn_gate_inp.weight", None, False),
    "mlp.router.bias": ("ffn_gate_inp.bias", None, False),
    "experts.gate_up_proj": ("ffn_{}_exps.weight", ("gate", "up"), True),
    "experts.gate_up_proj_bias": ("ffn_{}_exps.bias", ("gate", "up"), False),
    "experts.down_proj": ("ffn_down_exps.weight", None, True),
    "experts.down_proj_bias": ("ffn_down_exps.bias", None, False),
}
"""Of gpt-oss: names in the file, the two that are taken apart, and whether it is turned round."""


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
    return qwen35_metadata(config) if family.startswith("qwen3_5") else {}


def qwen35_metadata(config: Any) -> dict[str, Any]:
    """Sizes of attention and of linear attention."""
    rope = config.rope_parameters
    sections = list(rope.get("mrope_section") or [])
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "full_attention_interval": 4,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_sections": [*sections, 0],
        "rope.dimension_count": int(rope["partial_rotary_factor"] * config.head_dim),
    }
    if config.model_type == "qwen3_5_text":
        return {**found, "feed_forward_length": config.intermediate_size}
    return {
        **found,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
    }


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
        apart = list(gpt_oss_tensors(full_name, values)) if architecture == "gpt-oss" else []
        if apart:
            yield from apart
            continue
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


def gpt_oss_tensors(full_name: str, values: Array) -> Iterator[tuple[str, Array]]:
    """Router, sinks and experts of gpt-oss: gate and up, which take turns, are taken apart."""
    for ending, (name, halves, is_turned) in _GPT_OSS_NAMES.items():
        if full_name.endswith(ending):
            block = f"blk.{full_name.split('.layers.')[1].split('.')[0]}."
            turned = values.swapaxes(-1, -2) if is_turned else values
            if halves is None:
                yield block + name, np.ascontiguousarray(turned)
                continue
            axis = 1 if is_turned else -1
            for half, start in zip(halves, (0, 1), strict=True):
                taken = turned.take(range(start, turned.shape[axis], 2), axis)
                yield block + name.format(half), np.ascontiguousarray(taken)


def tiled_value_heads(name: str, values: Array, config: Any) -> Array:
    """Of qwen35: value heads in the order of the first of each key head, then the second."""
    keys = config.linear_num_key_heads
    each = config.linear_num_value_heads // keys
    width = config.linear_value_head_dim
    if "ssm_out" in name:  # it reads them: its columns
        return tiled(values.T, keys, each).T
    first = 0
    if "attn_qkv" in name or "ssm_conv1d" in name:  # queries and keys stay
        first = 2 * config.linear_key_head_dim * keys
    assert len(values) - first in (keys * each, keys * each * width)
    return np.concatenate([values[:first], tiled(values[first:], keys, each)])


def tiled(rows: Array, groups: int, each: int) -> Array:
    """Rows of (group, member, ...) as (member, group, ...)."""
    return rows.reshape(groups, each, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def converted(name: str, values: Array, config: Any, architecture: str) -> Array:
    """The values of one tensor as the converter changes them."""
    if architecture == "llama" and re.search(r"attn_[qk]\.weight", name):
        heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
        return values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
    if architecture == "gpt2" and _TRANSPOSED.search(name):
        return values.T
    if architecture in _PLUS_ONE and name.endswith("norm.weight") and "ssm_norm" not in name:
        return values + 1
    if architecture == "bloom" and "attn_qkv" in name:
        return (
            values.reshape(config.n_head, 3, -1, *values.shape[1:])
            .swapaxes(0, 1)
            .reshape(values.shape)
        )
    if architecture.startswith("qwen35"):
        if name.endswith("ssm_a"):
            values = -np.exp(values)
        if "ssm_conv1d" in name:
            values = values.squeeze(1)
        if _VALUE_HEADS.search(name):
            return tiled_value_heads(name, values, config)
    if "shortconv.conv" in name or "ffn_gate_inp_shexp" in name:
        return values.squeeze()
    return values
