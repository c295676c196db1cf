"""Revisions of a hub's model, a folder's own code that is trusted, weights in half precision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.saved_teachers import CONFIGS, build, save

LOAD = """
import logging, sys
import torch
from cleangpt.teacher import load_teacher
logging.basicConfig(level=logging.INFO)
name, trusted, *revisions = sys.argv[1:]
for revision in revisions or [None]:
    teacher = load_teacher(name, revision=revision, trust_remote_code=trusted == "trusted")
    first = float(next(teacher.model.parameters()).flatten()[0])
    print(type(teacher.model).__name__, teacher.model.dtype, f"{first:.6f}")
"""
OWN_CODE = """
from transformers import GPT2Config, GPT2LMHeadModel

class OwnConfig(GPT2Config):
    model_type = "own"

class Own(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def loaded(place: Path, *arguments: str) -> tuple[list[list[str]], str]:
    """What a process of its own loads, a line each, and its log: caches are set on importing."""
    places = {"HF_HOME": "home", "HF_HUB_CACHE": "hub", "HF_MODULES_CACHE": "modules"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"} | {k: str(place / v) for k, v in places.items()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines()], done.stderr


@pytest.mark.slow
def test_a_revision_is_a_branch_a_tag_or_a_commit(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    first = []
    for seed, (name, commit) in enumerate((("main", "a" * 40), ("v1", "b" * 40))):
        model = build("gpt2")
        with torch.no_grad():
            model.transformer.wte.weight.add_(seed)
        save(repository / "snapshots" / commit, model)
        (repository / "refs" / name).write_text(commit)
        first.append(f"{model.transformer.wte.weight[0, 0].item():.6f}")
    lines, _ = loaded(tmp_path, "owner/tiny", "", "main", "v1", "b" * 40)
    assert [line[-1] for line in lines] == [first[0], first[1], first[1]]


@pytest.mark.slow
def test_code_that_is_trusted_runs_and_that_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    save(folder, build("gpt2"))
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    config |= {"model_type": "own", "architectures": ["Own"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    lines, said = loaded(tmp_path, str(folder), "trusted")
    assert lines[0][0] == "Own"
    assert "code that comes with teacher" in said


@pytest.mark.parametrize(
    "stored", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]
)
def test_half_precision_teaches_as_the_numbers_it_stores(
    stored: torch.dtype, tmp_path: Path
) -> None:
    from examples.run_distillation_example import main

    place = save(tmp_path / "half", build("llama").to(stored))
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"line {i} of a text to read" for i in range(60))
    )
    flags = ["--teacher_model_name_or_path", place, "--dataset_name", str(tmp_path / "text.txt")]
    flags += ["--student_n_embd", "16", "--student_n_head", "2", "--block_size", "16"]
    flags += ["--epochs_per_block", "1", "--device", "cpu"]
    names = {torch.float16: "fp32", torch.bfloat16: "bf16"}
    main([*flags, "--teacher_dtype", names[stored], "--output_dir", str(tmp_path / "run")])
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert all(0 < row["last_loss"] < float("inf") for row in stages)
    assert CONFIGS["llama"]().num_hidden_layers == len([r for r in stages if "block" in r])
