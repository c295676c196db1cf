"""Checksums of what a run writes, so that damage is an error and never another number.

A folder of files has ``SHA256SUMS`` beside them, which ``sha256sum -c`` reads too. A JSON object
carries the checksum of all it says besides. Both find accidents: a flipped bit, a file cut short, a
line edited by hand. They do not authenticate: who can write a file can write its checksum.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from cleangpt.errors import CheckpointError

SUMS_NAME = "SHA256SUMS"
CARD_NAME = "README.md"
"""A model's card. It has no checksum: people write in it, and an evaluation adds its figures."""
SEAL = "sha256"
"""The key of a JSON object under which its checksum stands."""
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_MAX_SUMS_BYTES = 2**20
_CHUNK_BYTES = 2**16
_REMEDY = (
    "Copy or save it again; if you changed it on purpose, delete the SHA256SUMS file beside it."
)


def file_digest(path: Path, size: int | None = None) -> str:
    """SHA-256 (hex) of a file, or of its first ``size`` bytes, in little memory."""
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while chunk := file.read(min(left, _CHUNK_BYTES)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` of every file in the folder and below it, but for its card."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    kept_out = (SUMS_NAME, CARD_NAME)
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in names if name not in kept_out]
    (folder / SUMS_NAME).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Refuse a folder that is not what was written; one without ``SHA256SUMS`` is not judged.

    Raises:
        CheckpointError: If a file is missing or differs, or the list itself is damaged.
    """
    path = folder / SUMS_NAME
    if not path.is_file():
        return
    for name, expected in _read_sums(path):
        try:
            same = file_digest(folder / name) == expected
        except OSError as error:
            cause = f"{folder / name} is listed in {SUMS_NAME} and cannot be read: {error.strerror}"
            raise CheckpointError(f"{cause}.", _REMEDY) from error
        if not same:
            raise CheckpointError(
                f"{folder / name} is not what was written (SHA-256 differs).", _REMEDY
            )


def _read_sums(path: Path) -> list[tuple[str, str]]:
    """Names and checksums; names that lead out of the folder are damage too."""
    try:
        if path.stat().st_size > _MAX_SUMS_BYTES:
            raise ValueError("too long")
        lines = path.read_text(encoding="utf-8").splitlines()
        matches = [_LINE.fullmatch(line) for line in lines]
        found = [(match[2], match[1]) for match in matches if match]
        inside = all(
            not name.startswith("/") and ".." not in Path(name).parts and "\0" not in name
            for name, _ in found
        )
        if len(found) < len(lines) or not inside:
            raise ValueError("no list of checksums")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged.", _REMEDY) from error
    return found


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """Parse JSON that must be an object.

    Raises:
        ValueError: For anything else: no JSON, no object, no UTF-8, NaN, or nested so deep that the
            parser gives up.
    """
    try:
        content = json.loads(text, parse_constant=_no_such_number)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} and no JSON object")
    return content


def _no_such_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def sealed(content: dict[str, Any], *more: str) -> dict[str, Any]:
    """The object with its checksum, which takes in ``more``, what the object stands for."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    return {**plain, SEAL: _object_digest(plain, more)}


def is_as_sealed(content: dict[str, Any], *more: str) -> bool:
    """Whether an object that was read is what :func:`sealed` returned, for the same ``more``."""
    rest = {name: value for name, value in content.items() if name != SEAL}
    return content.get(SEAL) == _object_digest(rest, more)


def _object_digest(content: dict[str, Any], more: tuple[str, ...]) -> str:
    text = json.dumps([content, *more], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
