"""Disk errors in two lines: what could not be written, how much room there is, and what to do."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cleangpt.errors import CleanGPTError, EnvironmentProblem

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors_explained(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn the operating system's disk errors into one line of cause and one of remedy.

    PyTorch, safetensors and tokenizers have words of their own for them, which are understood too.

    Args:
        path: What is written, or its folder.
        needed_bytes: How many bytes that takes; None if that is not known.

    Raises:
        EnvironmentProblem: For any such error inside the block.
    """
    try:
        yield
    except Exception as error:
        number = _disk_error(error)
        if number is None:
            raise
        free = f"{_free_bytes(path):,} bytes free"
        room = free if needed_bytes is None else f"{needed_bytes:,} bytes needed, {free}"
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentProblem(
                f"No space left to write {path} ({room}).",
                "Free some space, or choose an output_dir on another disk.",
            ) from error
        if number == errno.EFBIG:
            raise EnvironmentProblem(
                f"The limit on the size of a file does not let {path} be written ({room}).",
                "Raise that limit (ulimit -f), or choose an output_dir on another disk.",
            ) from error
        raise EnvironmentProblem(
            f"Cannot write {path}: {os.strerror(number) if number else error}.",
            "Check that the path is a writable directory, or choose another output_dir.",
        ) from error


def _free_bytes(path: Path) -> int:
    """What is free where the path is, or will be."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:  # not there yet, or not any more
            continue
    return 0


def _disk_error(error: Exception) -> int | None:
    """The system's number of a disk error, 0 if it has none; None for an error of another kind."""
    if isinstance(error, CleanGPTError):
        return None
    if isinstance(error, OSError):
        return error.errno or 0
    found = _SYSTEM_ERROR.search(str(error))
    if found:
        return int(found[1])
    # torch.save complains about positions; what Python's file object had said comes before it.
    before = error.__context__ if isinstance(error, RuntimeError) else None
    return before.errno if isinstance(before, OSError) else None
