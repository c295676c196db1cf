"""Files made to run code or to exhaust memory (D09 to D11 of docs/faults.md)."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cleangpt.checkpoints import Checkpoint, Checkpoints
from cleangpt.errors import CheckpointError, InputError
from cleangpt.integrity import SEAL, sealed
from cleangpt.runtime.module_state import tensors_fingerprint
from distillation.utils import load_checkpoint, save_checkpoint
from tests.builders import tiny_student, tiny_teacher


class Canary:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_malicious_model_folder_runs_no_code(kind: str, tmp_path: Path) -> None:
    from cleangpt.teacher import load_teacher
    from distillation.evaluation.loading import load_model
    from tests.byte_tokenizer import make_tokenizer

    folder = tmp_path / "model"
    tiny_teacher(vocab_size=258, bos_token_id=256, eos_token_id=256).save_pretrained(folder)
    make_tokenizer(eos_token="<end>").save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    evil = {"transformer.wte.weight": Canary(tmp_path / "canary")}
    if kind == "torch":
        torch.save(evil, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(evil, 2))
    with pytest.raises(InputError, match="cannot be read: .*(could run code|hickle|pickle)"):
        load_teacher(str(folder))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(str(folder))
    assert not (tmp_path / "canary").exists()


def test_pickles_beside_a_checkpoint_are_never_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", "ab" * 16)
    checkpoints.save(Checkpoint(1, {"w": torch.ones(3)}, {}))
    folder = next((tmp_path / "c").iterdir())
    for name in ("optimizer.pt", "rng_state.pth", ".metadata", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert checkpoints.newest() is not None
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"/annex/objects/SHA256E-s1", b"version https://git-lfs.x"])
def test_a_pointer_in_place_of_weights_is_named(content: bytes, tmp_path: Path) -> None:
    from distillation.evaluation.loading import load_model

    student = tiny_student()
    student.save_pretrained(tmp_path / "final")
    save_checkpoint(student, tmp_path / "a.pt")
    for path in (tmp_path / "a.pt", tmp_path / "final" / "model.safetensors"):
        path.write_bytes(content)
    for name in ("a.pt", "final"):
        with pytest.raises(CheckpointError, match="pointer"):
            load_model(str(tmp_path / name))


def test_an_archive_that_unfolds_beyond_its_size_is_not_read(tmp_path: Path) -> None:
    path = save_checkpoint(nn.Linear(2, 2), tmp_path / "a.pt")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/9", bytes(5_000_000))
    with pytest.raises(CheckpointError, match=r"claims to hold 5,\d+,\d+"):
        load_checkpoint(path)


@pytest.mark.parametrize("change", [{"n_layer": 10**9}, {"n_embd": 10**6, "n_head": 1}], ids=str)
def test_a_configuration_larger_than_its_file_takes_no_memory(
    change: dict[str, int], tmp_path: Path
) -> None:
    from distillation.evaluation.loading import load_model

    path = save_checkpoint(tiny_student(), tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    metadata = {k: v for k, v in json.loads(content["metadata"]).items() if k != SEAL}
    metadata["config"].update(change)
    own = tensors_fingerprint(content["model_state_dict"].items())
    torch.save({**content, "metadata": json.dumps(sealed(metadata, own))}, path)
    with pytest.raises(CheckpointError, match="blocks; there are|does not fit"):
        load_model(str(path))


def test_a_header_that_claims_the_world_is_refused(tmp_path: Path) -> None:
    from distillation.evaluation.loading import load_model

    tiny_student().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(str(tmp_path))
