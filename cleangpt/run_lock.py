"""The lock that keeps two runs out of one directory; the kernel frees it however a run ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cleangpt.errors import EnvironmentProblem

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has no flock; there the lock is left out.
    fcntl = None

_held: list[Any] = []
"""The open lock files of this process."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder inside the block.

    Raises:
        EnvironmentProblem: If another run holds it.
    """
    if fcntl is None:
        yield
        return
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise held(folder, file.read().strip()) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename}")
        file.flush()
        _held.append(file)
        try:
            yield
        finally:
            _held.remove(file)


def held(folder: Path, holder: str) -> EnvironmentProblem:
    """The refusal of a folder that another run holds."""
    return EnvironmentProblem(
        f"Another run holds {folder} ({holder or 'unknown process'}).",
        "Wait for it, stop it, or choose another output_dir.",
    )


def holder_of(folder: Path) -> str | None:
    """What the process that holds the folder now says of itself; None if none does.

    Whoever held it last may live on without it, as a notebook does. So, where that process is
    there, the lock is tried for an instant, shared with others that look.
    """
    if fcntl is None or holder_lives(folder) is False:
        return None
    try:
        with (folder / ".lock").open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip()
    except OSError:
        pass
    return None


def holder_lives(folder: Path) -> bool | None:
    """Whether the process that last held the folder is there; None if that cannot be told.

    The lock itself is not touched: a look must not keep a run out.
    """
    try:
        words = (folder / ".lock").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    if fcntl is None or len(words) != 4 or not words[1].isdecimal():
        return None
    if words[3] != os.uname().nodename:
        return None
    return psutil.pid_exists(int(words[1]))


def _let_go() -> None:
    """Close what a forked process has inherited.

    The lock belongs to the open file and so to every process that has it open: a loader's workers,
    which outlive a killed run by some seconds, would keep the next start out.
    """
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
