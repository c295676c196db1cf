"""Teachers in GGUF files: architectures, quantised numbers, tokenizers, padding, and damage."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf: Any = pytest.importorskip("gguf")

from benchmarks.families import tiny_model, try_gguf  # noqa: E402 - after the package they need
from benchmarks.gguf_files import ARCHITECTURES, UNSTATED, write_gguf  # noqa: E402
from benchmarks.teachers import PAGE, gguf_row, gguf_section  # noqa: E402
from cleangpt.errors import InputError  # noqa: E402
from cleangpt.teacher import load_teacher  # noqa: E402
from cleangpt.vocabulary import check_same_tokens, token_rows  # noqa: E402
from cleangpt.weight_files import check_file  # noqa: E402
from distillation.evaluation import evaluate_distilled_model  # noqa: E402
from examples import run_distillation_example as command  # noqa: E402

TOKENS, ROWS = 2048, 2112
SIZES = {"vocab_size": ROWS, "intermediate_size": 64}  # quantised numbers come in blocks of 32
QUICK = ("llama", "gpt2", "qwen2")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_teacher("builtin").tokenizer


def written(folder: Path, tokenizer: Any, architecture: str = "llama", **options: Any) -> Path:
    """A tiny file, with rows of padding beyond its tokens."""
    model = tiny_model(ARCHITECTURES[architecture], **SIZES)
    return write_gguf(model, tokenizer, folder / "tiny.gguf", architecture, **options)


def verdicts() -> dict[str, str]:
    """The verdicts of the page."""
    part = Path(PAGE).read_text(encoding="utf-8").partition("## GGUF files")[2]
    rows = re.findall(r"^\| ([\w-]+) \| ([\w ]+) \|", part, flags=re.MULTILINE)
    return {name: verdict for name, verdict in rows if name != "architecture"}


@pytest.mark.parametrize("architecture", QUICK)
def test_a_file_is_the_model_that_it_was_written_from(
    architecture: str, tokenizer: Any, tmp_path: Path
) -> None:
    teacher = load_teacher(str(written(tmp_path, tokenizer, architecture)))
    model = tiny_model(ARCHITECTURES[architecture], **SIZES)
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(ids).logits, model(ids).logits)
    assert verdicts()[architecture] == "works"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", verdicts())
def test_an_architecture_is_what_the_page_says(architecture: str) -> None:
    finding = try_gguf(architecture)
    assert finding.verdict == verdicts()[architecture]
    if finding.verdict == "works":
        assert finding.logits is not None
        assert finding.logits < 1e-6
    assert gguf_row(finding) in gguf_section([finding])


def test_the_page_has_every_architecture_that_is_read() -> None:
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    sections = {"general", "tokenizer"}  # of the file, listed as if they were architectures
    others = {"t5", "umt5", "deci", "mistral"}  # encoder-decoders; read as llama; never written
    read = {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - sections - others
    known = {re.sub(r"[_-]|_text$", "", name) for name in verdicts()}
    assert known == {re.sub(r"[_-]", "", name) for name in read}
    assert set(UNSTATED) <= set(verdicts())


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_quantised_numbers_are_plain_once_loaded(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    file = written(tmp_path, tokenizer, "qwen2", quantization=kind)
    teacher = load_teacher(str(file))
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}
    assert not getattr(teacher.model.config, "quantization_config", None)
    original = tiny_model("qwen2", **SIZES).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    stored = gguf.quants.quantize(original[name].numpy(), gguf.GGMLQuantizationType[kind])
    plain = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
    weight = teacher.model.state_dict()[name]
    assert torch.equal(weight, torch.from_numpy(plain).float())
    assert not torch.equal(weight, original[name])
    teacher.model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    assert load_teacher(str(tmp_path / "plain")).fingerprint == teacher.fingerprint


def test_the_tokenizer_of_a_file_is_the_models(tokenizer: Any, tmp_path: Path) -> None:
    found = load_teacher(str(written(tmp_path, tokenizer))).tokenizer
    text = "def f(x):\n    return [x + 1, 'two', 3.0]  # and so on"
    assert found(text).input_ids == tokenizer(text).input_ids
    check_same_tokens(found.get_vocab(), tokenizer.get_vocab(), "it", "")
    assert token_rows(found) == TOKENS < len(found) == ROWS
    assert found.eos_token_id == tokenizer.eos_token_id


@pytest.mark.slow
def test_both_commands_run_on_a_quantised_padded_file(tokenizer: Any, tmp_path: Path) -> None:
    file = str(written(tmp_path, tokenizer, "qwen2", quantization="Q8_0"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of a small text to learn from" for i in range(60)))
    run = tmp_path / "run"
    shared = ["--dataset_name", str(text), "--max_samples", "30", "--device", "cpu"]
    flags = ["--teacher_model_name_or_path", file, "--student_n_embd", "16", "--block_size", "16"]
    command.main([*flags, *shared, "--output_dir", str(run), "--epochs_per_block", "1"])
    assert json.loads((run / "final" / "config.json").read_text())["vocab_size"] == TOKENS
    flags = ["--model_path", str(run), "--teacher_model_name", file, "--speed_seconds", "0"]
    evaluate_distilled_model.main([*flags, *shared])
    result = json.loads((run / "evaluation" / "results.json").read_text())
    assert [model["size"]["vocab_size"] for model in result["models"]] == [ROWS, TOKENS]
    assert any(f"use the first {TOKENS}" in note for note in result["notes"])


@pytest.mark.parametrize("damage", ["cut short", "unknown", "another shape"])
def test_files_that_cannot_be_read_are_refused_in_two_lines(
    damage: str, tokenizer: Any, tmp_path: Path
) -> None:
    if damage == "another shape":  # of which the file does not tell
        model = tiny_model("qwen3", vocab_size=ROWS, head_dim=8)
        file = write_gguf(model, tokenizer, tmp_path / "tiny.gguf", "qwen3")
    else:
        file = written(tmp_path, tokenizer)
    content = file.read_bytes()
    if damage == "cut short":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "unknown":
        file.write_bytes(content.replace(b"llama", b"zzzzz"))
    causes = {
        "cut short": "cannot be read",
        "unknown": "architecture zzzzz is not supported",
        "another shape": r"k_norm.weight is \[8\] in the file and \[128\] in a Qwen3",
    }
    with pytest.raises(InputError, match=causes[damage]) as caught:
        load_teacher(str(file))
    assert str(file) in caught.value.cause
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 2


def told_of_positions(
    path: Path,
    scaling: str | None = None,
    *,
    tensor: bool = False,
    wide: bool = False,
    **fractions: float,
) -> Path:
    """A GGUF file with no more than what it says about rotary positions."""
    writer = gguf.GGUFWriter(path, "llama")
    if scaling:
        writer.add_string("llama.rope.scaling.type", scaling)
    for name, value in fractions.items():
        add = writer.add_float64 if wide else writer.add_float32
        add(f"llama.rope.{name.replace('__', '.')}", value)
    if tensor:
        writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("told", "positions"),
    [
        ("llama.rope.scaling.type", {"scaling": "linear", "scaling__factor": 4.0}),
        ("llama.rope.scaling.type", {"scaling": "yarn", "scaling__factor": 1.0}),
        ("llama.rope.scaling.type", {"scaling": "linear", "scaling__factor": 4.0, "wide": True}),
        ("llama.rope.scaling.factor", {"scaling__factor": 4.0}),
        ("llama.rope.scale_linear", {"scale_linear": 0.5}),
        ("rope_freqs.weight", {"scaling": "none", "tensor": True}),
    ],
)
def test_scaled_rotary_positions_are_refused(
    told: str, positions: dict[str, Any], tmp_path: Path
) -> None:
    """They are not read, and without them the model is another one."""
    file = told_of_positions(tmp_path / "scaled.gguf", **positions)
    with pytest.raises(InputError, match="scaled rotary positions") as caught:
        load_teacher(str(file))
    assert told in caught.value.cause
    assert "HuggingFace folder" in caught.value.cause


@pytest.mark.parametrize(
    "positions",
    [
        {"scaling__factor": 1.0},
        {"scaling": "none", "scale_linear": 4.0},
        {"scaling": "linear"},
        {"scaling": "linear", "scaling__factor": 1.0},
    ],
)
def test_positions_that_are_not_scaled_are_let_through(
    positions: dict[str, Any], tmp_path: Path
) -> None:
    assert check_file(told_of_positions(tmp_path / "plain.gguf", **positions)) == 0
