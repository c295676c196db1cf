"""Checkpoints of a run: folders that are complete and verified, or invisible.

A checkpoint is ``step-00000123-1a2b3c4d/`` (a number that only grows, and whose run it is) with
``tensors.safetensors``, ``state.json`` and, written last, ``MANIFEST.json`` with the size and
SHA-256 of both. It is made under a temporary name beside its final one, synced, renamed, read back
and verified; only then older ones are deleted, and only those this run wrote. Nothing in it is ever
executed. What the tensors mean is not known here.
"""

import contextlib
import json
import logging
import math
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cleangpt.disk_errors import disk_errors_explained
from cleangpt.errors import CheckpointError
from cleangpt.integrity import file_digest, parse_json_object
from cleangpt.run_directory import follow_umask_and_sync, sync_folder
from cleangpt.runtime.faultpoints import faultpoint
from cleangpt.runtime.module_state import not_finite

logger = logging.getLogger(__name__)

KEPT = 2
"""Verified checkpoints that stay; a damaged newest one then still leaves another."""
FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8})-([0-9a-f]{8})")
_FILES = ("tensors.safetensors", "state.json")
_FLOAT = "not a JSON number"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Args:
        step: A number that grows with every checkpoint of a run.
        tensors: By name, on the CPU.
        state: Everything else, plain JSON data.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in a folder.

    Args:
        folder: Where they are; made with the first one.
        run_id: Whose they are; those of other runs are neither read nor deleted.
        writes: Whether this process writes and deletes, and does not only read.
    """

    def __init__(self, folder: Path, run_id: str, *, writes: bool = True) -> None:
        self.folder = folder
        self.run_id = run_id
        self.writes = writes

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write one, verify it, and delete those of this run that are older than the one before.

        Raises:
            CheckpointError: If a tensor is not finite, or what was written cannot be read back.
            EnvironmentProblem: If it cannot be written; earlier ones are then untouched.
        """
        refuse_nonfinite(checkpoint.tensors, "no checkpoint was written")
        target = self.folder / f"step-{checkpoint.step:08d}-{self.run_id[:8]}"
        temporary = self.folder / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            needed = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
            with disk_errors_explained(self.folder, needed):
                temporary.mkdir(parents=True)
                faultpoint("checkpoint.begun")
                self._fill(temporary, checkpoint)
                faultpoint("checkpoint.before_rename")
                temporary.replace(target)
                faultpoint("checkpoint.renamed")
                sync_folder(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        problem = self._problem(target)
        if problem:
            raise CheckpointError(
                f"{target} does not hold what was just written: {problem}.",
                "The disk may be failing; choose an output_dir on another one.",
            )
        faultpoint("checkpoint.verified")
        for old in self._own()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        faultpoint("checkpoint.pruned")
        return target

    def newest(self) -> Checkpoint | None:
        """The newest one that verifies; None if there is none of this run at all.

        Raises:
            CheckpointError: If there are some and all are damaged: no run starts over silently.
        """
        for stale in self.folder.glob(".step-*.tmp") if self.writes else ():
            shutil.rmtree(stale, ignore_errors=True)
        problems = []
        for path in self._own():
            problem = self._problem(path)
            if problem is None:
                return _read(path)
            problems.append(f"{path.name}: {problem}")
            logger.warning("Checkpoint %s is not used: %s.", path, problem)
        if problems:
            raise CheckpointError(
                f"No checkpoint in {self.folder} can be used ({'; '.join(problems)}).",
                "Restore one of them from a copy, or start again with --overwrite.",
            )
        return None

    def last_number(self) -> int:
        """The highest number among this run's checkpoints, damaged ones too; 0 without any."""
        return max((_number(path) for path in self._own()), default=0)

    def remove(self) -> None:
        """Delete this run's checkpoints, once its result is safe."""
        if not self.writes:
            return
        for path in self._own():
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # something of another's is there
            self.folder.rmdir()

    def _fill(self, folder: Path, checkpoint: Checkpoint) -> None:
        tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
        seen: set[int] = set()
        for name, tensor in tensors.items():  # safetensors refuses memory that is shared
            if tensor.data_ptr() in seen:
                tensors[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        save_file(tensors, folder / _FILES[0])
        faultpoint("checkpoint.tensors_written")
        state = json.dumps(_named_nonfinite(checkpoint.state), allow_nan=False)
        (folder / _FILES[1]).write_text(state, encoding="utf-8")
        faultpoint("checkpoint.state_written")
        manifest = {
            "format_version": FORMAT_VERSION,
            "run_id": self.run_id,
            "step": checkpoint.step,
            "files": {name: _digest(folder / name) for name in _FILES},
        }
        (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for file in folder.iterdir():
            follow_umask_and_sync(file)
        sync_folder(folder)

    def _own(self) -> list[Path]:
        """This run's checkpoints, the newest first, damaged ones among them."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.is_dir()]
        named = [(path, _NAME.fullmatch(path.name)) for path in found]
        own = [path for path, match in named if match and match[2] == self.run_id[:8]]
        return sorted(own, reverse=True)

    def _problem(self, path: Path) -> str | None:
        """Why a checkpoint cannot be used; None if it is whole."""
        manifest = _manifest(path)
        if manifest is None:
            return "its MANIFEST.json is missing or damaged"
        if manifest.get("format_version") != FORMAT_VERSION:
            return f"its format version is {manifest.get('format_version')!r}"
        if manifest.get("run_id") != self.run_id:
            return "its MANIFEST.json names another run"
        files = manifest.get("files")
        for name in _FILES:
            expected = files.get(name) if isinstance(files, dict) else None
            try:
                if not (path / name).is_file():
                    return f"{name} is missing"
                if expected != _digest(path / name):
                    return f"{name} is not what was written (SHA-256)"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror or error})"
        return None


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        return parse_json_object((path / "MANIFEST.json").read_bytes())
    except (OSError, ValueError):
        return None


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def refuse_nonfinite(tensors: Mapping[str, Tensor], outcome: str) -> None:
    """Refuse tensors with a NaN or an infinity in them.

    Args:
        tensors: By name; those of whole numbers always pass.
        outcome: What did not happen because of it, for the message.

    Raises:
        CheckpointError: Naming the first of them.
    """
    broken = not_finite(tensors)
    if broken:
        raise CheckpointError(
            f"{len(broken)} tensors hold NaN or infinite numbers, the first is {broken[0]};"
            f" {outcome}.",
            "Lower the learning rate or max_grad_norm and train again, from the last checkpoint"
            " (--resume) if there is one.",
        )


def _read(path: Path) -> Checkpoint:
    """Read a verified checkpoint.

    Raises:
        CheckpointError: If it was whole and still cannot be understood, or holds NaN.
    """
    try:
        tensors = load_file(path / _FILES[0])
        state = _numbered_nonfinite(parse_json_object((path / _FILES[1]).read_bytes()))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            "It was written by other software; start again with --overwrite.",
        ) from error
    refuse_nonfinite(tensors, f"{path} is not used")
    return Checkpoint(_number(path), tensors, state)


def _named_nonfinite(value: Any) -> Any:
    """The same with NaN and infinities as an object of one such word: JSON has no such numbers.

    A stage of no steps has no loss, and a run that goes on must know just that.
    """
    if isinstance(value, dict):
        return {key: _named_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    return value


def _numbered_nonfinite(value: Any) -> Any:
    """What :func:`_named_nonfinite` was given."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        return {key: _numbered_nonfinite(item) for key, item in value.items()}
    return [_numbered_nonfinite(item) for item in value] if isinstance(value, list) else value


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
