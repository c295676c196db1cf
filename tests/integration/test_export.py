"""A student in other forms: equal logits, or a refusal that says why; nothing half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from cleangpt.cli import run_command
from cleangpt.errors import CheckpointError, UsageError
from cleangpt.integrity import check_sums
from distillation.export import comparing, gguf_file, main
from distillation.export.gpt2 import to_gpt2
from model import VanillaTransformerModelDistillation
from tests.evaluation_samples import byte_tokenizer, save_run
from tests.reference_students import noisy_student, tokens

gguf = pytest.importorskip("gguf")

SHAPES: dict[str, dict[str, Any]] = {
    "as built": {},
    "biases": {"bias": True},
    "whole heads mixed": {"use_channel_factor_v": True, "use_channel_factor_proj": True},
    "mixed, with biases": {"use_channel_factor_proj": True, "bias": True},
    "low rank": {"head_rank": 5},
    "untied": {"tie_word_embeddings": False},
    "another activation": {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
}


def student_of(shape: str) -> Any:
    """Fields that ``GPTConfig`` lacks are HuggingFace's."""
    from model import VanillaConfig

    own = noisy_student("Vanilla", padding_idx=2).config
    config = VanillaConfig.from_fields(own)
    fields = {**config.to_dict(), "tie_word_embeddings": None, **SHAPES[shape]}
    fields = {n: v for n, v in fields.items() if hasattr(VanillaConfig, n) and n != "model_type"}
    torch.manual_seed(0)
    student = VanillaTransformerModelDistillation(VanillaConfig(**fields))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return student.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_gpt2_computes_the_same(shape: str, tmp_path: Path) -> None:
    student, ids = student_of(shape), tokens(2, 20)
    to_gpt2(student).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    gpt2 = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(gpt2) is GPT2LMHeadModel
    torch.testing.assert_close(gpt2(ids).logits, student(ids).logits, rtol=1e-5, atol=1e-5)
    tied = gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert tied is (student.lm_head.weight is student.wte.weight)
    padded = tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    ours = student.generate(padded, attention_mask=mask, **options)
    assert torch.equal(gpt2.generate(padded, attention_mask=mask, **options), ours)


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("Factored", {}, "two streams"),
        ("SASP", {}, "no skip connections"),
        ("Vanilla", {"final_norm": "folded"}, "folded into the head"),
    ],
)
def test_a_shape_without_an_equal_is_refused(
    kind: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        to_gpt2(noisy_student(kind, **fields))


def test_a_class_of_ones_own_is_refused() -> None:
    class Other(VanillaTransformerModelDistillation):
        """Could compute anything."""

    with pytest.raises(UsageError, match="Other is a class of its own"):
        to_gpt2(Other(noisy_student("Vanilla").config))


def test_a_difference_is_refused() -> None:
    student, other = noisy_student("Vanilla"), noisy_student("Vanilla", seed=1)
    with pytest.raises(CheckpointError, match="differs from the student"):
        comparing.compare(lambda t: student(t).logits, lambda t: other(t).logits, 41, 24)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError):
            comparing.check(comparing.Difference(bad, 1.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with the built-in teacher's tokenizer, which has merges."""
    from cleangpt.builtin import builtin_teacher_path

    run = save_run(tmp_path_factory.mktemp("export") / "run", vocab_size=2048)
    AutoTokenizer.from_pretrained(builtin_teacher_path()).save_pretrained(run / "final")
    return run


@pytest.mark.parametrize("stored", [pytest.param("F32", marks=pytest.mark.slow), "F16"])
def test_gguf_comes_back_with_its_tokenizer(stored: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [str(run), "--format", "gguf", "--output", str(out), "--gguf_type", stored]
    assert run_command(main, flags) == 0
    reader = gguf.GGUFReader(out / gguf_file.FILE_NAME)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.attn_qkv.weight"] == stored
    assert {types["position_embd.weight"], types["output_norm.bias"]} == {"F32"}
    assert "output.weight" not in types  # tied
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=gguf_file.FILE_NAME)
    text = "a line, it's\n 12 of them<|endoftext|>and on"
    own = AutoTokenizer.from_pretrained(run / "final")
    assert tokenizer(text).input_ids == own(text).input_ids
    assert tokenizer.eos_token_id == own.eos_token_id == 0
    positions = reader.fields["gpt2.context_length"].contents()
    model = AutoModelForCausalLM.from_pretrained(  # it would take any GPT-2 for one of 1024
        out, gguf_file=gguf_file.FILE_NAME, n_positions=positions
    )
    ids = torch.randint(0, 2048, (2, 9))
    expected = AutoModelForCausalLM.from_pretrained(run / "final", trust_remote_code=True)(ids)
    assert torch.allclose(model(ids).logits, expected.logits, atol=1e-5 if stored == "F32" else 0.1)


def test_gguf_refuses_what_llama_cpp_would_read_in_another_way(tmp_path: Path) -> None:
    from tokenizers import normalizers, pre_tokenizers

    with pytest.raises(UsageError, match="tanh form of GELU"):
        gguf_file.check_activation(to_gpt2(student_of("another activation")).config)
    tokenizer = byte_tokenizer()
    assert gguf_file.pre_tokenizer_of(tokenizer) == "gpt-2"
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    assert gguf_file.pre_tokenizer_of(tokenizer) == "smollm"
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level])
    with pytest.raises(UsageError, match="splits text by Whitespace, ByteLevel"):
        gguf_file.pre_tokenizer_of(tokenizer)
    student = to_gpt2(noisy_student("Vanilla", vocab_size=258))
    with pytest.raises(UsageError, match="merges nothing"):
        gguf_file.write_gguf(student, byte_tokenizer(), tmp_path / "x")
    backend.normalizer = normalizers.NFC()
    with pytest.raises(UsageError, match="with a normalizer"):
        gguf_file.pre_tokenizer_of(tokenizer)


def test_the_command_writes_a_checked_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("hf", "gpt2"):
        out = tmp_path / "exports" / form
        assert run_command(main, [str(run), "--format", form, "--output", str(out)]) == 0
        shown = capsys.readouterr().out
        assert "largest difference of a logit: 0.00e+00" in shown
        assert shown.splitlines()[-1] == f"exported: {out}"
        check_sums(out)
        record = json.loads((out / "export.json").read_text())
        assert record["format"] == form
        assert record["largest_logit"] > 0
        card = (out / "README.md").read_text()
        assert ("trust_remote_code=True" in card) is False
        assert bool(list(out.glob("*.py"))) is (form == "hf")
        assert {"generation_config.json", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    # What llama.cpp's converter asks for.
    assert json.loads((out / "config.json").read_text())["n_ctx"] == 32


def test_only_an_earlier_export_is_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = [str(run), "--format", "gpt2", "--output", str(out)]
    assert run_command(main, flags) == 0
    before = (out / "export.json").read_bytes()
    assert run_command(main, flags) == 2
    assert "is there already" in capsys.readouterr().err
    (out / "old").touch()
    assert run_command(main, [*flags, "--overwrite"]) == 0
    assert not (out / "old").exists()
    assert (out / "export.json").read_bytes() == before
    for other in (run, tmp_path):
        assert run_command(main, [*flags[:-1], str(other), "--overwrite"]) == 2
        assert "Nothing was deleted" in capsys.readouterr().err
    assert (run / "final" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["Factored", "SASP"])
def test_a_refused_export_leaves_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", kind)
    flags = [str(run), "--format", "gguf", "--output", str(tmp_path / "out")]
    assert run_command(main, flags) == 2
    error = capsys.readouterr().err
    assert "no equal in GPT-2" in error
    assert "--format hf or onnx" in error
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_damage_is_exit_code_four(run: Path, tmp_path: Path) -> None:
    from cleangpt.integrity import write_sums

    final = save_run(tmp_path / "run") / "final"
    write_sums(final)
    content = bytearray((final / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (final / "model.safetensors").write_bytes(content)
    assert run_command(main, [str(final), "--output", str(tmp_path / "out")]) == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Vanilla", "Factored", "SASP"])
def test_onnx_computes_the_same_in_its_runtime(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra: make test-slow")
    run = save_run(tmp_path / "run", kind)
    out = tmp_path / "out"
    assert run_command(main, [str(run), "--format", "onnx", "--output", str(out)]) == 0
    assert "largest difference of a logit" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out / "model.onnx")
    names = [item.name for item in session.get_inputs()]
    assert names[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert [item.name for item in session.get_outputs()][:2] == ["logits", "present.0.key"]


def test_a_missing_package_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is not None:
        pytest.skip("onnxruntime is installed")
    run = save_run(tmp_path / "run")
    flags = [str(run), "--format", "onnx", "--output", str(tmp_path / "out")]
    assert run_command(main, flags) == 5
    assert "pip install 'cleangpt-distillation[onnx]'" in capsys.readouterr().err
