"""Names that may be local paths or hub names: which is which, and whether the hub can be reached.

The libraries retry an unreachable hub for about twenty seconds per file. Here the cache is asked
first, then one short probe decides, so a run without a network fails at once or does not notice.
Knows nothing about models or texts; ``teacher`` and ``data.hub_texts`` build on it.
"""

import contextlib
import difflib
import importlib
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cleangpt.errors import EnvironmentProblem, InputError

logger = logging.getLogger(__name__)

PROBE_SECONDS = 2.5
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def local_path(name: str, *, flag: str, suffixes: tuple[str, ...] = ()) -> Path | None:
    """Return the existing path that ``name`` means, or None if it can only be a hub name.

    Args:
        name: What the user typed.
        flag: The flag it came from, for the message.
        suffixes: Endings, such as ``.gguf``, that a hub name does not have.

    Raises:
        InputError: If the name is a path (by its form) and nothing is there.
    """
    try:
        path = Path(name).expanduser()
        if name and path.exists():
            return path
        siblings = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, no such user
        raise InputError(
            f"{name!r} cannot be a path: {getattr(error, 'strerror', None) or error}.",
            f"Give {flag} an existing path, or a name such as owner/name.",
        ) from error
    is_path = name.startswith((".", "/", "~")) or "\\" in name or path.suffix in suffixes
    if not is_path and _HUB_NAME.fullmatch(name):
        return None
    nearest = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.75)
    hint = f"Did you mean {path.parent / nearest[0]}? " if nearest else ""
    raise InputError(
        f"there is no file or folder {name!r}, and it is not a hub name either.",
        f"{hint}Give {flag} an existing path, or a name such as owner/name.",
    )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let the HuggingFace libraries use their caches only; any request raises at once."""
    places: list[Any] = [importlib.import_module("huggingface_hub.constants")]
    if "datasets" in sys.modules:
        places.append(importlib.import_module("datasets.config"))
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def is_hub_reachable(seconds: float = PROBE_SECONDS) -> bool:
    """Return whether the hub answers one request in time; False in the libraries' offline mode.

    Args:
        seconds: Longest wait. Name resolution is included, which no HTTP timeout covers.
    """
    hub = importlib.import_module("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def probe() -> None:
        try:
            # Any answer will do, a refusal included. The library's client knows the user's proxies.
            hub.get_session().head(constants.ENDPOINT, timeout=seconds)
            answered.set()
        except Exception as error:
            logger.debug("the hub does not answer: %s", error)
        finally:
            done.set()

    done = threading.Event()
    threading.Thread(target=probe, name="hub-probe", daemon=True).start()
    done.wait(seconds)
    return answered.is_set()


def unreachable(kind: str, name: str, *, flag: str, revision: str | None = None) -> Exception:
    """Return the error for a name that is not cached while the hub cannot be reached.

    Args:
        kind: ``model`` or ``data set``.
        name: The hub name.
        flag: The flag that takes a local path instead.
        revision: The revision asked for, if any.
    """
    constants = importlib.import_module("huggingface_hub.constants")
    state = "offline mode is on" if constants.HF_HUB_OFFLINE else "no answer"
    at = f" at revision {revision}" if revision else ""
    return EnvironmentProblem(
        f"{kind} {name!r}{at} is not in the local cache ({constants.HF_HOME}) and the hub "
        f"({constants.ENDPOINT}) cannot be reached ({state}).",
        f"Pass a local path to {flag}, or fill that cache on a connected machine and copy it here "
        "(HF_HOME names the folder).",
    )


def refused(kind: str, name: str, error: Exception, *, flag: str) -> EnvironmentProblem:
    """Return the error for a name that the hub does not give: unknown, private or gated."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return EnvironmentProblem(
        f"{kind} {name!r} could not be fetched: {lines[0] if lines else type(error).__name__}",
        f"Check the name and your access (a gated one needs a login), pass a local path to {flag}, "
        "or fill the local cache on a machine that has access.",
    )
