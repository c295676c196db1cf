"""Which model a path means, and clear refusals for everything else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.errors import CheckpointError, CleanGPTError, InputError, UsageError
from distillation.evaluation.loading import check_same_vocabulary, load_model

CHECKPOINT = "student_model_final_distilled.pt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.evaluation_samples import save_run, save_teacher

    root = tmp_path_factory.mktemp("models")
    save_run(root / "run", "Factored")
    save_teacher(root / "teacher")
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run that a test may damage."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def write_manifest(folder: Path, status: str) -> None:
    from cleangpt.integrity import sealed

    content = sealed({"run_id": "x", "format_version": 2, "status": status})
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize("place", ["", "final", CHECKPOINT])
def test_a_run_loads_by_any_of_its_parts(made: Path, place: str) -> None:
    loaded = load_model(str(made / "run" / place))
    assert loaded.name == "Factored"
    assert loaded.run_dir == made / "run"
    assert loaded.stitches is not None
    assert loaded.stitches.layer_map == (0, 2)
    assert loaded.vocabulary is not None
    assert not loaded.model.training
    ids = torch.tensor([[1, 2, 3]])
    other = load_model(str(made / "run" / CHECKPOINT)).model
    assert torch.allclose(loaded.model(ids).logits, other(ids).logits, atol=1e-6)


def test_a_huggingface_folder_loads(made: Path) -> None:
    loaded = load_model(str(made / "teacher"))
    assert loaded.name == "teacher"
    assert loaded.stitches is None
    assert type(loaded.model).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize("kind", ["Vanilla", "SASP"])
def test_students_of_every_kind_load(kind: str, tmp_path: Path) -> None:
    from tests.evaluation_samples import save_run

    folder = save_run(tmp_path / "run", kind)
    assert load_model(str(folder / CHECKPOINT), model_type=kind).name == kind


@pytest.mark.parametrize("place", ["", CHECKPOINT])
def test_another_type_than_saved_is_a_usage_error(made: Path, place: str) -> None:
    with pytest.raises(UsageError, match=r"SASP.*Factored"):
        load_model(str(made / "run" / place), model_type="SASP")


@pytest.fixture
def mine(tmp_path: Path) -> Any:
    """A user's own class, and where it is saved: ``run/final`` and a checkpoint beside it."""
    from distillation.utils.checkpoint import save_checkpoint
    from tests.evaluation_samples import student

    class Mine(type(student("Vanilla"))):  # type: ignore[misc]
        pass

    own = Mine(student("Vanilla").config)
    own.save_pretrained(tmp_path / "run" / "final")
    save_checkpoint(own, tmp_path / "run" / CHECKPOINT)
    return Mine


PLACES = pytest.mark.parametrize("place", ["run", f"run/{CHECKPOINT}"])


@PLACES
def test_a_registered_subclass_loads_as_itself(
    mine: Any, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import model

    monkeypatch.setitem(model.STUDENTS, "Own", mine)
    assert type(load_model(str(tmp_path / place)).model) is mine
    assert type(load_model(str(tmp_path / place), model_type="own").model) is mine
    plain = load_model(str(tmp_path / place), model_type="Vanilla").model
    assert type(plain) is model.STUDENTS["Vanilla"]


@PLACES
def test_an_unregistered_subclass_is_refused(mine: Any, place: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"class Mine, which is not") as caught:
        load_model(str(tmp_path / place))
    assert 'model.STUDENTS["Mine"] = Mine' in caught.value.remedy
    assert len(str(caught.value).splitlines()) == 2
    plain = load_model(str(tmp_path / place), model_type="Vanilla").model
    assert type(plain) is mine.__mro__[1]


def test_a_folder_that_names_no_class_loads_by_its_type(run: Path) -> None:
    path = run / "final" / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    assert load_model(str(run)).name == "Factored"


def test_a_half_trained_checkpoint_is_labelled(tmp_path: Path) -> None:
    from distillation.utils.checkpoint import save_checkpoint
    from tests.evaluation_samples import student

    save_checkpoint(student(), tmp_path / "half.pt", step=3, total_steps=10)
    assert load_model(str(tmp_path / "half.pt")).name == "Vanilla (step 3 of 10)"


def test_a_run_that_is_not_done_is_noted(run: Path) -> None:
    write_manifest(run, "running")
    assert "running" in load_model(str(run)).notes[0]


def test_a_run_without_a_model_is_refused(run: Path) -> None:
    shutil.rmtree(run / "final")
    (run / CHECKPOINT).unlink()
    write_manifest(run, "failed")
    with pytest.raises(CheckpointError, match="unfinished"):
        load_model(str(run))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("content", [LFS, b"<!DOCTYPE html><html>", b"", b"garbage" * 100])
@pytest.mark.parametrize("name", [CHECKPOINT, "final/model.safetensors"])
def test_files_that_are_no_weights_are_refused(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(run / CHECKPOINT if name == CHECKPOINT else run))
    assert len(str(caught.value).splitlines()) == 2


def test_half_a_file_is_refused(run: Path) -> None:
    for name in (CHECKPOINT, "final/model.safetensors"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])
    for place in (run, run / CHECKPOINT):
        with pytest.raises(CheckpointError):
            load_model(str(place))


def test_missing_weights_are_refused_not_made_up(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = run / "final" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "blocks" in name))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing_keys"):
        load_model(str(run))


def test_damaged_stitches_are_refused(run: Path) -> None:
    (run / "stitching_layers.safetensors").write_bytes(b"garbage" * 20)
    with pytest.raises(CheckpointError, match="stitching"):
        load_model(str(run))


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"model_type": "nonsense"}', '{"model_type": "t5"}', "{}"]
)
def test_folders_that_are_no_causal_model_are_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CleanGPTError) as caught:
        load_model(str(tmp_path))
    assert caught.value.exit_code in (3, 4)


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match=r"nope\.pt"):
        load_model(str(tmp_path / "nope.pt"))


def test_vocabularies_must_mean_the_same(made: Path) -> None:
    from tests.evaluation_samples import byte_tokenizer

    loaded = load_model(str(made / "run"))
    tokenizer: Any = byte_tokenizer()
    check_same_vocabulary(loaded, tokenizer)
    ids = tokenizer.get_vocab()
    ids["a"], ids["b"] = ids["b"], ids["a"]
    tokenizer.get_vocab = lambda: ids
    with pytest.raises(InputError, match=r"2 ids differ, first \d+ \('a', not 'b'\), \d+ \('b', "):
        check_same_vocabulary(loaded, tokenizer)


def test_a_model_that_cannot_be_found_is_told_by_its_own_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CleanGPTError) as caught:
        load_model("no-such-student", flag="--model_path")
    assert "--model_path" in caught.value.remedy
    assert "--teacher" not in caught.value.remedy
