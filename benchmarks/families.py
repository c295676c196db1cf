"""Every family of causal language models that transformers ships, as a tiny teacher, tried out.

A family is built small from its configuration, saved and loaded as any teacher is, looked at block
by block, and distilled: blocks, head and polish. What is measured is on random weights: whether a
family's structure is understood, not whether a good student comes of it. ``teachers`` makes the
page of it.
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.gguf_files import ARCHITECTURES, UNSTATED, write_gguf
from cleangpt.blocks import BlockStack
from cleangpt.errors import CleanGPTError
from cleangpt.teacher import Teacher, load_teacher
from config_distillation import GPTConfig
from distillation import DistillationTrainer
from distillation.preflight import check_structure
from model import build_student

FAMILIES: Final = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
MOST_PARAMETERS = 40_000_000
"""Families that stay larger than this when all of the fields below are small are not tried."""
MOST_IN_GGUF = 300_000_000
"""The same of GGUF files: no file states the sizes of Gemma 4's tables for each block."""
SMALL: Final[dict[str, Any]] = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "d_model": 32,
    "num_hidden_layers": 3,
    "decoder_layers": 3,
    "num_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "d_ff": 48,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "rotary_dim": 4,
    "multi_query": False,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "state_size": 8,
    "vocab_size_per_layer_input": 2048,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "n_mels": 8,
}
"""Taken by every family that has a field of that name."""
LATENT_ATTENTION: Final = (
    *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"),
    *("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"),
)
QWEN35: Final = {
    "num_hidden_layers": 4,  # the last has full attention
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
SMALL_VISION: Final = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
"""The part for pictures, which no text comes through."""
OWN: Final[dict[str, dict[str, Any]]] = {
    **{family: {"num_key_value_heads": 4, "head_dim": 4} for family in LATENT_ATTENTION},
    **{family: {"num_key_value_heads": 4} for family in ("dots3_note", "dots3_note_text")},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "n_layers": 3,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "git": {"vision_config": SMALL_VISION},
    "xlnet": {"d_head": 8, "d_inner": 48},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "phi4_multimodal": {
        "vision_config": SMALL_VISION,
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 8,
        },
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gpt_neo": {"num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), QWEN35),
    "prophetnet": {"num_encoder_layers": 3, "num_decoder_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "attention_head_size": 8,
    },
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single families need besides."""
READ_ONLY: Final = {
    "falcon": ("head_dim",),
    "prophetnet": ("num_hidden_layers",),
    "xlnet": ("max_position_embeddings",),
    "xlstm": ("v_head_dim",),
}
"""Names that a family computes from others."""


@dataclass(frozen=True)
class Finding:
    """What became of one family.

    Args:
        family: Its ``model_type``.
        verdict: "works", "refused" (with our words), "fails", "differs" or "not tried".
        remark: Why, or what is not as usual; may be empty.
        logits: Largest difference between the model's logits and those from the last block's state
            on, as a share of the largest logit.
        advance: The same for a block run alone against the whole pass.
        padding: The same for states of a padded window against the unpadded one, the worse side.
    """

    family: str
    verdict: str
    remark: str = ""
    logits: float | None = None
    advance: float | None = None
    padding: float | None = None


def tiny_config(family: str, **own: Any) -> Any:
    """A configuration of the family with three small blocks, and with these fields of its own."""
    text = AutoConfig.for_model(family).get_text_config()
    known = {*text.to_dict(), *getattr(type(text), "attribute_map", {})}
    small = {key: value for key, value in SMALL.items() if key in known or hasattr(text, key)}
    small |= {**OWN.get(family, {}), **own}
    for name in READ_ONLY.get(family, ()):
        small.pop(name)
    return type(text)(**small)


def tiny_model(family: str, most: int = MOST_PARAMETERS, **own: Any) -> Any:
    """A random model of the family; weights three times as large as usual, so that blocks act.

    Args:
        family: Its ``model_type``.
        most: Parameters that it may have.
        own: Fields of its configuration.

    Raises:
        ValueError: If the family cannot be built small.
    """
    config = tiny_config(family, **own)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > most:
        raise ValueError(f"its smallest form here has {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    return model.eval()


def try_family(family: str) -> Finding:
    """Build, save, load, take apart and distil one family."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            model = tiny_model(family)
            model.save_pretrained(folder)
        except Exception as error:  # its configuration has other rules than we know
            return Finding(family, "not tried", f"cannot be built small: {one_line(error)}")
        load_teacher("builtin").tokenizer.save_pretrained(folder)
        try:
            teacher = load_teacher(folder)
            stack = BlockStack(teacher.model)
            check_structure(stack)
            measured = look_inside(stack)
            distil(teacher, Path(folder) / "run")
        except CleanGPTError as error:
            cause = error.cause.replace(f"teacher {folder}", "it").replace(folder, "it")
            return Finding(family, "refused", cause)
        except Exception as error:  # a model that needs more than tokens
            return Finding(family, "fails", one_line(error))
    remark = "" if measured["padding"] < 1e-4 else "windows without padding only"
    return Finding(family, "works", remark, **measured)


def try_gguf(architecture: str) -> Finding:
    """Write a tiny model of one architecture as a GGUF file, load it, take it apart, distil it.

    The finding's ``logits`` is the largest difference to the logits of the model that was written.
    """
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    with quiet(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.gguf"
        unstated = UNSTATED.get(architecture, {})
        model = tiny_model(ARCHITECTURES[architecture], MOST_IN_GGUF, **unstated)
        write_gguf(model, load_teacher("builtin").tokenizer, file, architecture)
        try:
            teacher = load_teacher(str(file))
            logits = difference(
                teacher.model(ids, use_cache=False).logits, model(ids, use_cache=False).logits
            )
            distil(teacher, Path(folder) / "run")
        except CleanGPTError as error:
            return Finding(architecture, "refused", error.cause.replace(f"teacher {file}", "it"))
        text = teacher.tokenizer.decode(teacher.tokenizer("a word").input_ids).endswith("a word")
    if logits > 1e-5 or not text:
        return Finding(architecture, "differs", "" if text else "its tokenizer", logits=logits)
    return Finding(architecture, "works", "", logits=logits)


@torch.no_grad()
def look_inside(stack: BlockStack) -> dict[str, float]:
    """The three differences of a :class:`Finding`."""
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    logits, states = stack.logits(ids), stack.block_states(ids)
    moved = [stack.advance(i, states[i], ids) for i in range(stack.num_blocks)]
    padding = []
    for side in ("left", "right"):
        padded, mask = (pad(each, fill, side) for each, fill in ((ids, 5), (ids * 0 + 1, 0)))
        state = stack.block_states(padded, mask)[-1]
        state = state[:, 3:] if side == "left" else state[:, :-3]
        padding.append(difference(state, states[-1]))
    return {
        "logits": difference(stack.logits_of(states[-1], ids), logits),
        "advance": max(map(difference, moved, states[1:])),
        "padding": max(padding),
    }


def pad(rows: Tensor, fill: int, side: str) -> Tensor:
    """Three more columns on one side."""
    columns = torch.full((len(rows), 3), fill)
    return torch.cat((columns, rows) if side == "left" else (rows, columns), dim=1)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def distil(teacher: Teacher, folder: Path) -> None:
    """Blocks, head and polish, two batches each.

    Raises:
        CleanGPTError: As a real run would.
    """
    vocab = BlockStack(teacher.model).vocab_size
    config = GPTConfig(vocab_size=vocab, n_layer=2, n_head=2, n_embd=16, block_size=16, dropout=0.0)
    student = build_student(config)
    ids = torch.randint(3, 99, (2, 4, 12), generator=torch.Generator().manual_seed(1))
    loader = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]
    trainer = DistillationTrainer(
        teacher.model,
        student,
        teacher.tokenizer,
        loader,
        output_dir=folder,
        distill_loss_type="nmse",
        precision="fp32",
        show_progress=False,
    )
    trainer.train(epochs_per_block=1, lr_per_block=1e-3, polish_epochs=1)


@contextmanager
def quiet() -> Iterator[None]:
    """Neither the libraries' advice nor our own log."""
    log = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.set_verbosity(level)


def one_line(error: Exception) -> str:
    """An error's kind and first line, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}"
