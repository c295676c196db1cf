"""The folder that an export makes: what may be replaced, and what it is known by."""

from pathlib import Path
from typing import Final

from cleangpt.errors import UsageError

RECORD_NAME: Final = "export.json"
"""What an export says of itself. Only folders that hold one are ever replaced."""


def check_target(output: Path, *, overwrite: bool) -> None:
    """Refuse a place where an export may not go. Writes nothing.

    Raises:
        UsageError: If something is there that may not, or must not, be replaced.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UsageError(
            f"{output} is there already.",
            "Choose another --output, or pass --overwrite to replace an earlier export.",
        )
    if not output.is_dir() or output.is_symlink() or not (output / RECORD_NAME).is_file():
        raise UsageError(
            f"{output} is not an earlier export: it holds no {RECORD_NAME}.",
            "Nothing was deleted; choose another --output.",
        )
