"""A run's ``final/`` in a process that cannot import this project."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
import transformers

from tests.evaluation_samples import save_run, student

# What a user does with the folder, in the order of the tutorials of transformers.
LOADER = """
import builtins, importlib.util, os, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

for ours in ("distillation", "cleangpt", "model", "config_distillation"):
    assert importlib.util.find_spec(ours) is None, ours
def asked(question=""):  # "Do you wish to run the custom code?": no exception, which may be caught
    sys.stderr.write(f"a question was asked: {question}\\n")
    sys.stderr.flush()
    os._exit(9)

builtins.input = asked
folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert GenerationConfig.from_pretrained(folder).max_length == 32
tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
batch = tokenizer(["A student", "The quick brown"], return_tensors="pt", padding=True)
assert batch.attention_mask[0, 0] == 0
options = dict(max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
whole = model.generate(**batch, **options)
beams = model.generate(**batch, num_beams=3, **options)
uncached = model.generate(**batch, num_beams=3, use_cache=False, **options)
assert torch.equal(beams, uncached)
alone = model.generate(**tokenizer("A student", return_tensors="pt"), **options)
assert torch.equal(alone[0], whole[0, whole.shape[1] - alone.shape[1]:])
text = pipeline("text-generation", model=folder, trust_remote_code=True)("A", max_new_tokens=3)
assert text[0]["generated_text"].startswith("A")
ids = torch.arange(1, 9)[None]
torch.save((model(ids).logits, whole, beams), out)
model.save_pretrained(folder + "_again")
tokenizer.save_pretrained(folder + "_again")
"""


def load_elsewhere(python: Path, folder: Path, kind: str, *flags: str) -> None:
    """Run ``LOADER`` and compare with the student itself."""
    run = save_run(folder / "run", kind)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [str(python), *flags, "-c", LOADER, str(run / "final"), str(folder / "out.pt")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logits, whole, beams = torch.load(folder / "out.pt", weights_only=True)
    own = student(kind)
    torch.testing.assert_close(logits, own(torch.arange(1, 9)[None]).logits)
    assert whole.shape[0] == beams.shape[0] == 2
    names = {path.name for path in (run / "final_again").iterdir()}
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "layers.py"} <= names


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["Vanilla", "Factored", "SASP"])
def test_a_clean_environment_loads_it_and_generates(kind: str, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    packages = next(home.rglob("site-packages"))
    # Folders named in a .pth are searched, but the .pth files in them, by which this project is
    # installed in editable form, are not read.
    roots = sorted(
        {str(Path(module.__file__ or "").parents[1]) for module in (torch, transformers)}
    )
    (packages / "libraries.pth").write_text("\n".join(roots) + "\n")
    load_elsewhere(python, tmp_path, kind)
