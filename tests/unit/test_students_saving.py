"""Students survive being saved, loaded, exported and resized."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cleangpt.blocks import BlockStack
from distillation.head_init import untie_lm_head
from model import FactoredConfig, StudentModel, VanillaTransformerModelDistillation
from tests.reference_students import KINDS, noisy_student, tokens

HEADS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {},
    "low rank": {"head_rank": 5},
    "folded": {"final_norm": "folded"},
    "folded low rank": {"final_norm": "folded", "head_rank": 5},
}


def loading_message(student_class: type[StudentModel], folder: Path) -> dict[str, Any]:
    _, info = student_class.from_pretrained(folder, output_loading_info=True)
    return {name: keys for name, keys in info.items() if keys}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_a_saved_student_is_the_same_student(kind: str, head: str, tmp_path: Path) -> None:
    options = {"bias": True, "use_v": True, "use_channel_factor_proj": True, "padding_idx": 2}
    options |= HEADS[head]
    student, ids = noisy_student(kind, output_hidden_states=True, **options), tokens(2, 6)
    if head == "untied":
        untie_lm_head(BlockStack(student))
        with torch.no_grad():
            student.lm_head.weight.mul_(1.5)
    student.save_pretrained(tmp_path)
    assert loading_message(type(student), tmp_path) == {}
    for loader in (type(student), AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is type(student)
        assert torch.equal(loaded(ids).logits, student(ids).logits)
        assert loaded.get_num_params() == student.get_num_params()
        assert (loaded.lm_head.weight is loaded.wte.weight) is (head == "tied")
        assert loaded.config.tie_word_embeddings is (head == "tied")
        assert loaded.all_tied_weights_keys == student.all_tied_weights_keys
        assert loaded.config.to_diff_dict() == student.config.to_diff_dict()
        assert loaded.generation_config.pad_token_id == 2
        assert loaded.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 8)
    eager = type(student).from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(ids).logits, student(ids).logits)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert stored["max_length"] == 24
    assert AutoConfig.from_pretrained(tmp_path).model_type == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_partial_checkpoint_starts_the_rest_afresh(kind: str, tmp_path: Path) -> None:
    """Weights that a file lacks get their initial values, and those it has are not touched."""
    student = noisy_student(kind)
    state = {k: v for k, v in student.state_dict().items() if "mlp.up" not in k}
    state.pop("lm_head.weight")
    student.save_pretrained(tmp_path, state_dict=state)
    loaded = type(student).from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]) is ("mlp.up" not in name), name
        assert value.isfinite().all()


def test_a_folded_norm_that_a_file_lacks_starts_as_the_identity(tmp_path: Path) -> None:
    student = noisy_student("Vanilla", final_norm="folded")
    state = {k: v for k, v in student.state_dict().items() if k != "final_norm.weight"}
    student.save_pretrained(tmp_path, state_dict=state)
    loaded = type(student).from_pretrained(tmp_path)
    assert torch.equal(loaded.final_norm.weight, torch.eye(25))


def test_other_keywords_in_a_configuration_file_are_refused(tmp_path: Path) -> None:
    FactoredConfig(vocab_size=10).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "n_heads": 2}))
    with pytest.raises(ValueError, match="FactoredConfig has no setting n_heads"):
        FactoredConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_can_be_resized(kind: str) -> None:
    student, ids = noisy_student(kind), tokens(1, 4)
    expected = student(ids).logits
    student.resize_token_embeddings(45)
    assert student.config.vocab_size == 45
    assert student.lm_head.weight is student.wte.weight
    assert student(ids).logits.shape == (1, 4, 45)
    torch.testing.assert_close(student(ids).logits[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("head", ["low rank", "folded", "folded low rank"])
def test_the_vocabulary_of_a_head_of_its_own_can_be_resized(head: str, tmp_path: Path) -> None:
    student, ids = noisy_student("SASP", **HEADS[head]), tokens(1, 4)
    expected = student(ids).logits
    student.resize_token_embeddings(45)
    assert student(ids).logits.shape == (1, 4, 45)
    torch.testing.assert_close(student(ids).logits[..., : expected.shape[-1]], expected)
    student.save_pretrained(tmp_path)
    assert torch.equal(type(student).from_pretrained(tmp_path)(ids).logits, student(ids).logits)


def test_code_travels_with_our_classes_and_not_with_a_subclass(tmp_path: Path) -> None:
    class Local(VanillaTransformerModelDistillation):
        """Defined where its file could not be loaded alone."""

    student = noisy_student("Vanilla")
    student.save_pretrained(tmp_path / "ours")
    files = {path.name for path in (tmp_path / "ours").glob("*.py")}
    assert files == {
        "configuration.py",
        "layers.py",
        "model_vanilla_distillation.py",
        "student.py",
    }
    Local(student.config).save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "model_vanilla_distillation.py").exists()


LOADER = """
import builtins, os, sys, torch
from transformers import AutoModelForCausalLM
builtins.input = lambda question="": os._exit(9)  # "Do you wish to run the custom code?"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "model" not in sys.modules and "config_distillation" not in sys.modules
ids = torch.arange(1, 6)[None]
torch.save((model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)), sys.argv[2])
model.save_pretrained(sys.argv[1] + "_again")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "head"), [*((kind, "tied") for kind in KINDS), ("SASP", "folded low rank")]
)
def test_an_exported_student_loads_without_this_project(
    kind: str, head: str, tmp_path: Path
) -> None:
    student, ids = noisy_student(kind, **HEADS[head]), torch.arange(1, 6)[None]
    student.save_pretrained(tmp_path / "student")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-P", "-c", LOADER, str(tmp_path / "student"), str(tmp_path / "out.pt")],
        check=True,
        cwd=tmp_path,
        env=environment,
        timeout=100,
    )
    logits, generated = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(logits, student(ids).logits)
    assert torch.equal(generated, student.generate(ids, max_new_tokens=4, do_sample=False))
    again = type(student).from_pretrained(tmp_path / "student_again")
    assert torch.equal(again(ids).logits, logits)
    assert (tmp_path / "student_again" / "layers.py").exists()
