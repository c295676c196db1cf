"""What cannot be a teacher, and what each refusal says."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cleangpt.errors import InputError, UsageError
from cleangpt.teacher import check_causal, check_vocabulary_rows, load_teacher
from tests.byte_tokenizer import make_tokenizer
from tests.saved_teachers import CONFIGS, SMALL, VOCAB, build, save


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> str:
    return save(tmp_path / "gpt2", build("gpt2"))


def refusal(name: str, **settings: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_teacher(name, **settings)
    assert len(str(caught.value).splitlines()) == 2
    return caught.value


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_no_tokenizer(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / family)
    error = refusal(str(tmp_path / family))
    assert f"{family} has no tokenizer" in error.cause
    assert "tokenizer.json" in error.cause
    assert "save_pretrained" in error.remedy


def test_unreadable_tokenizer(gpt2_folder: str) -> None:
    Path(gpt2_folder, "tokenizer.json").write_text("{broken")
    assert "tokenizer" in refusal(gpt2_folder).cause


def test_more_ids_than_rows(tmp_path: Path) -> None:
    config = CONFIGS["gpt2"]()
    config.vocab_size = 100
    config.bos_token_id = config.eos_token_id = 0
    name = save(tmp_path / "few", transformers.GPT2LMHeadModel(config))
    error = refusal(name)
    assert "ids up to 257" in error.cause
    assert "100 vocabulary rows" in error.cause


def test_padded_rows_are_fine() -> None:
    model = build("gpt2")
    model.resize_token_embeddings(320, mean_resizing=False)
    check_vocabulary_rows(make_tokenizer(eos_token="<end>"), model)


def bert_config(**settings: Any) -> Any:
    fields = {key: SMALL[key] for key in SMALL if key != "num_key_value_heads"}
    return transformers.BertConfig(**fields, **settings)


def test_encoders_are_refused(tmp_path: Path) -> None:
    masked = save(tmp_path / "masked", transformers.BertForMaskedLM(bert_config()))
    assert "is an encoder (BertForMaskedLM)" in refusal(masked).cause
    # Its class is a causal one by name; only its behaviour tells.
    torch.manual_seed(0)
    both_ways = transformers.BertLMHeadModel(bert_config(is_decoder=True))
    check_causal(both_ways.eval())
    for module in both_ways.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    both_ways.config.is_decoder = False
    with pytest.raises(InputError, match="not causal: its last token changes earlier logits"):
        check_causal(both_ways)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(number: float, tmp_path: Path) -> None:
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = number
    error = refusal(save(tmp_path / "broken", model))
    assert "NaN or infinite numbers in the teacher" in error.cause
    assert "another copy" in error.remedy
    assert "float32" in error.remedy


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2
    )
    name = save(tmp_path / "t5", transformers.T5ForConditionalGeneration(config))
    error = refusal(name)
    assert "encoder-decoder" in error.cause
    assert "looked for a decoder-only causal language model" in error.cause
    assert "model_type 't5'" in error.cause


def test_state_space_models_are_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)
    error = refusal(save(tmp_path / "mamba", transformers.MambaForCausalLM(config)))
    assert "is a state-space or recurrent model (no num_attention_heads" in error.cause
    assert "looked for a decoder-only causal language model" in error.cause
    assert "Llama" in error.remedy


def test_a_model_without_its_head(tmp_path: Path) -> None:
    name = save(tmp_path / "base", transformers.LlamaModel(CONFIGS["llama"]()))
    assert "lacks 1 weights" in refusal(name).cause
    assert "lm_head.weight" in refusal(name).cause


@pytest.mark.parametrize("damage", ["truncated", "absent", "not json", "unknown", "wrong shape"])
def test_damaged_folders(damage: str, gpt2_folder: str) -> None:
    weights, config = Path(gpt2_folder, "model.safetensors"), Path(gpt2_folder, "config.json")
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "absent":
        weights.unlink()
    elif damage == "not json":
        config.write_text("{")
    else:
        change = {"model_type": "zzz"} if damage == "unknown" else {"n_embd": 64}
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert gpt2_folder in refusal(gpt2_folder).cause


def test_remote_code_needs_the_flag(gpt2_folder: str) -> None:
    config = Path(gpt2_folder, "config.json")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    assert "--trust_remote_code" in refusal(gpt2_folder).remedy


def test_paths_where_no_model_is(tmp_path: Path, gpt2_folder: str) -> None:
    assert "Did you mean" in refusal(str(tmp_path / "gpt")).remedy
    assert "no file or folder" in refusal("./nope").cause
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(str(tmp_path / "empty")).cause
    assert "only .gguf files" in refusal(f"{gpt2_folder}/config.json").cause


def test_a_revision_of_a_folder(gpt2_folder: str) -> None:
    with pytest.raises(UsageError, match=r"no revisions.\n.*--teacher_revision"):
        load_teacher(gpt2_folder, revision="main")


def test_a_folder_of_several_gguf_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "a.gguf, b.gguf" in refusal(str(tmp_path)).cause


@pytest.mark.parametrize("content", [b"", b"GGUFxxxx", b"GGUF" + struct.pack("<IQQ", 3, 0, 0)])
def test_damaged_gguf_files(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(content)
    assert "x.gguf" in refusal(str(tmp_path / "x.gguf")).cause
