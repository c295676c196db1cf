"""Documents of a ``datasets`` name, or of a folder that ``save_to_disk`` wrote.

This file and ``streams`` alone import ``datasets``, inside their functions. The local cache is
asked before the network; see ``cleangpt.hub``.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cleangpt.data.text_sources import (
    choose_text_column,
    clean_documents,
    hold_out,
    no_such_split,
)
from cleangpt.errors import CleanGPTError, EnvironmentProblem, InputError
from cleangpt.hub import is_hub_reachable, offline, refused, unreachable

logger = logging.getLogger(__name__)

_FLAG = "--dataset_name"
_CUT_SHORT = re.compile(r"Expected to (?:be able to )?read \d+|Tried reading schema message")
_UNKNOWN_SPLIT = re.compile(r"(?:Unknown|Bad) split:? .*?\[(.*)\]", re.DOTALL)


def column_types(dataset: Any) -> dict[str, str]:
    """Return the type of each column, as ``choose_text_column`` wants them."""
    types = {}
    for name, feature in dataset.features.items():
        kind = str(getattr(feature, "dtype", type(feature).__name__.lower()))
        types[name] = "string" if kind in ("string", "large_string") else kind
    return types


def _values(dataset: Any, column: str) -> Iterator[Any]:
    for batch in dataset.select_columns([column]).iter(batch_size=1000):
        yield from batch[column]


def _open(name: str, config_name: str | None, split: str, streaming: bool) -> Any:
    """Return the split, from the cache if it is there, else from the hub."""
    import datasets

    try:
        with offline():
            return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:
        # Not in the cache, or not this configuration or split: the hub knows more, if it answers.
        in_cache = error
    again: dict[str, Any] = {}
    if _CUT_SHORT.search(str(in_cache)):  # the library would fail on such a file for ever
        logger.warning("data set %r is damaged in the cache (%s); building it anew", name, in_cache)
        again = {"download_mode": "reuse_cache_if_exists"}
    if not is_hub_reachable():
        if again:
            raise _damaged(name, in_cache)
        if _UNKNOWN_SPLIT.search(str(in_cache)):
            raise in_cache
        raise unreachable("data set", name, flag=_FLAG)
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming, **again)
    except (ConnectionError, FileNotFoundError, OSError) as error:
        raise refused("data set", name, error, flag=_FLAG) from error


def _damaged(name: str, error: Exception) -> EnvironmentProblem:
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    return EnvironmentProblem(
        f"data set {name!r} is damaged in the cache ({' '.join(str(error).split())}), and the hub"
        " cannot be reached to build it anew.",
        f"Delete {folder} and fetch it again with a network, or pass a local path to {_FLAG}.",
    )


def open_named(name: str, config_name: str | None, split: str, *, streaming: bool = False) -> Any:
    """Return the rows of one split of a ``datasets`` name.

    Raises:
        InputError: If it has no such configuration or split, or cannot be loaded.
        EnvironmentProblem: If it is not cached and cannot be fetched.
    """
    try:
        return _open(name, config_name, split, streaming)
    except CleanGPTError:
        raise
    except (ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        known = _UNKNOWN_SPLIT.search(text)
        if known:
            raise no_such_split(name, split, re.findall(r"[\w.-]+", known.group(1))) from None
        remedy = (
            "Choose one with --dataset_config_name."
            if "onfig" in text
            else f"Give {_FLAG} another name, or a local file or folder."
        )
        raise InputError(f"data set {name!r} cannot be loaded: {text}", remedy) from error


def open_saved(path: Path, split: str) -> tuple[Any, bool]:
    """Return the rows, and whether they have no splits."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"folder {path} looks like a saved data set but cannot be read: {error}",
            "Save it again with save_to_disk, or give text files.",
        ) from error
    if not isinstance(saved, dict):
        return saved, True
    if split not in saved:
        raise no_such_split(str(path), split, list(saved))
    return saved[split], False


def load_named(
    name: str,
    path: Path | None,
    config_name: str | None,
    split: str,
    text_column: str | None,
    max_samples: int,
) -> tuple[list[str], str, list[str]]:
    """Return documents, their column and notes; arguments as ``load_texts`` has them.

    Args:
        name: A ``datasets`` name.
        path: The folder, if it is a saved data set; then ``name`` is only used in messages.
        config_name: Configuration, if the data set has several.
        split: Split, or a slice of one such as ``train[:10%]``.
        text_column: Column of documents, or None.
        max_samples: First so many documents; 0 for all.
    """
    if path:
        opened, has_one_split = open_saved(path, split)
    else:
        opened, has_one_split = open_named(name, config_name, split), False
    column, notes = choose_text_column(column_types(opened), text_column)
    wanted = 0 if has_one_split else max_samples
    texts, dropped = clean_documents(_values(opened, column), column, wanted)
    notes += [dropped] if dropped else []
    if has_one_split:
        texts = hold_out(texts, name, split, max_samples, notes)
    return texts, column, notes
