import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cleangpt.errors import CheckpointError, EnvironmentProblem, InputError
from distillation.utils import load_checkpoint, save_checkpoint
from tests.builders import tiny_student


@pytest.mark.parametrize("kind", ["Vanilla", "Factored", "SASP"])
def test_a_student_comes_back(tmp_path: Path, kind: str) -> None:
    student = tiny_student(kind)
    path = save_checkpoint(student, tmp_path / "deep" / "student.pt", note="x", losses=[1.0])
    other = tiny_student(kind, seed=9)
    loaded = load_checkpoint(path, other)
    assert loaded["model_type"] == kind
    assert loaded["config"]["n_embd"] == 16
    assert loaded["metadata"]["note"] == "x"
    for name, tensor in student.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_the_file_is_tensors_and_one_string(tmp_path: Path) -> None:
    path = save_checkpoint(nn.Linear(2, 3), tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    assert set(content) == {"model_state_dict", "metadata"}
    assert isinstance(json.loads(content["metadata"]), dict)


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(nn.Linear(2, 3), tmp_path / "a.pt")
    model = nn.Linear(2, 4)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=r"does not fit the Linear.*\(3, 2\), model \(4, 2\)"):
        load_checkpoint(path, model)
    assert torch.equal(model.weight, before)
    with pytest.raises(CheckpointError, match=r"missing \['weight'\].*unexpected"):
        load_checkpoint(
            save_checkpoint(nn.Sequential(model), tmp_path / "b.pt"), nn.Linear(2, 4, False)
        )


def test_no_nan_is_ever_written(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.bias[1] = float("nan")
    with pytest.raises(CheckpointError, match=r"the first is bias.*was not written"):
        save_checkpoint(model, tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_loading_never_runs_code(tmp_path: Path) -> None:
    evil = {"model_state_dict": {"w": Canary(tmp_path / "canary")}, "metadata": "{}"}
    torch.save(evil, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(evil))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "large-file pointer"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"", "cannot be read"),
        (b"PK\x03\x04 cut short", "cannot be read"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.pt")


def test_missing_foreign_and_newer_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
        load_checkpoint(tmp_path / "state.pt")
    newer = {"model_state_dict": {}, "metadata": json.dumps({"format_version": 99})}
    torch.save(newer, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match=r"format version 99.*reads 2"):
        load_checkpoint(tmp_path / "newer.pt")
    for metadata in ("not json", "[]", "{"):
        torch.save({"model_state_dict": {}, "metadata": metadata}, tmp_path / "bad.pt")
        with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
            load_checkpoint(tmp_path / "bad.pt")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="Cannot write"):
        save_checkpoint(nn.Linear(1, 1), tmp_path / "file" / "a.pt")
