"""The manifest of a run: what the run was, how it ended, and the checksums of what it left."""

import json
import logging
from pathlib import Path
from typing import Any

from cleangpt import __version__
from cleangpt.errors import CheckpointError
from cleangpt.integrity import file_digest, is_as_sealed, parse_json_object
from cleangpt.metrics_log import without_nonfinite

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
"""From 2 on a manifest carries its own checksum, and those of the run's other files."""
DECIDE_BITS = (
    *("library_version", "torch_version", "transformers_version", "torch_threads"),
    *("processes", "device"),
    *("cpu_capability", "attention"),
)
"""What changes the order in which numbers are added, and so the last bits of a run."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a run says; None if no run of this library is in the folder.

    Raises:
        CheckpointError: If it is damaged, or of another version of this library.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        found = parse_json_object(path.read_bytes())
    except (OSError, ValueError):
        found = {}
    version = found.get("format_version", FORMAT_VERSION)
    if "run_id" in found and version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}; this library reads {FORMAT_VERSION}.",
            "Use the version of the library that wrote it, or choose another output_dir.",
        )
    if "run_id" not in found or not is_as_sealed(found):
        raise CheckpointError(
            f"{path} is not the manifest of a run of this library, or it was changed.",
            "Choose another output_dir, or restore the file from a copy.",
        )
    return found


def check_listed(folder: Path, name: str) -> None:
    """Refuse a file of a finished run that is not the one its manifest lists.

    A run that is not done, a file it does not list, and a folder without a manifest pass.

    Raises:
        CheckpointError: If the file, or the manifest, was damaged or changed.
    """
    expected = ((read_manifest(folder) or {}).get("files") or {}).get(name)
    if expected is None:
        return
    path = folder / name
    if not path.is_file() or file_digest(path) != expected:
        raise CheckpointError(
            f"{path} is missing, or is not what the run wrote (SHA-256 differs).",
            "Restore it from a copy of the run.",
        )


def check_same_run(earlier: dict[str, Any], about: dict[str, Any], path: Path) -> None:
    """Refuse to go on with a run of another teacher, student, data or seed.

    Raises:
        CheckpointError: Naming what differs.
    """
    names = ("seed", "data", "validation_data", "teacher", "student", "optimizer")
    known = json.loads(json.dumps(without_nonfinite({"library_version": __version__, **about})))
    different = [n for n in names if n in known and _named(earlier.get(n)) != _named(known[n])]
    used = [about.get("precision", {}).get("used") for about in (earlier, known)]
    if used[0] != used[1]:
        different.append(f"precision ({used[0]}; name it with --precision)")
    if different:
        raise CheckpointError(
            f"The run in {path} has another {', '.join(different).replace('_', ' ')}.",
            "Go on with the command that began it, or choose another output_dir.",
        )
    changed = [
        f"{name} was {earlier.get(name)} and is {known.get(name)}"
        for name in DECIDE_BITS
        if earlier.get(name) != known.get(name)
    ]
    if changed:
        logger.warning(
            "%s: the end will not have the bits of a run that never stopped.", "; ".join(changed)
        )


def _named(value: Any) -> Any:
    """What makes a model the one it is: a head that was untied since adds parameters, no more."""
    if isinstance(value, dict):
        return {key: own for key, own in value.items() if key != "parameters"}
    return value
