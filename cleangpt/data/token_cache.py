"""Packed token streams kept on disk, so that a text is tokenized once per tokenizer.

A file's name is a hash of everything the stream depends on: the documents, the tokenizer down to
its vocabulary, the special tokens around documents and the version of the packing. A file is
written under another name and then renamed, so two processes cannot spoil each other's; its
checksum is compared on every use. One that is damaged is made again, and a place that cannot be
used costs a warning and nothing else. No whole file is ever deleted here: the folder can be, at any
time.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import transformers
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cleangpt.data.text_sources import texts_fingerprint
from cleangpt.disk_errors import disk_errors_explained
from cleangpt.errors import EnvironmentProblem
from cleangpt.run_directory import write_atomically
from cleangpt.runtime.module_state import tensors_checksum

logger = logging.getLogger(__name__)

MIN_CHARACTERS = 1_000_000
"""Shorter texts are tokenized in less than half a second; a file of them would only be clutter."""

_FORMAT_VERSION = "1"
_OLD_SECONDS = 24 * 3600.0


class TokenStream(NamedTuple):
    """Documents as one stream of tokens.

    Args:
        tokens: All token ids, int64.
        starts: Where each document that gave tokens begins, ascending from 0, int64. What separates
            it from the next belongs to the document before.
    """

    tokens: Int[Tensor, " tokens"]
    starts: Int[Tensor, " documents"]


def default_directory() -> Path | None:
    """Where commands keep streams; None if the user has no home, as in some containers.

    The folder ``tokens`` in ``$CLEANGPT_CACHE``, or else in ``cleangpt`` of ``$XDG_CACHE_HOME`` or
    of ``~/.cache``.
    """
    own = os.environ.get("CLEANGPT_CACHE")
    if own:
        return Path(own) / "tokens"
    # The XDG rules say that a relative path there is to be ignored.
    user = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        user = user if user.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return user / "cleangpt" / "tokens"


def cached_stream(
    directory: Path,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    make: Callable[[], TokenStream],
) -> TokenStream:
    """Return what ``make`` returns, from ``directory`` if it is there; else put it there.

    Texts below ``MIN_CHARACTERS``, and tokenizers that cannot be told apart by their contents, are
    not kept.

    Args:
        directory: Made if it is not there. A place that cannot be used is a warning, no error.
        texts: The documents.
        tokenizer: What turns them into tokens.
        about: What else the stream depends on, for the key; must survive JSON.
        make: Tokenizes and packs.
    """
    if sum(map(len, texts)) < MIN_CHARACTERS:
        return make()
    identity = tokenizer_fingerprint(tokenizer)
    if identity is None:
        return make()
    key = {**about, "texts": texts_fingerprint(texts), "tokenizer": identity}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = directory / f"{name}.safetensors"
    found = _read(path)
    if found is not None:
        logger.info("Tokens of %d documents from the cache at %s", len(texts), path)
        return found
    stream = make()
    _write(path, stream)
    return stream


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 (hex) of all that decides which tokens a text gives; None if that cannot be known.

    It cannot for a class from outside transformers: its code may change and its files stay.
    """
    kind = type(tokenizer)
    if not kind.__module__.startswith("transformers."):
        return None
    digest = hashlib.sha256(
        f"{kind.__module__}.{kind.__qualname__} {tokenizers.__version__} {transformers.__version__}"
        f" {getattr(tokenizer, 'split_special_tokens', None)}".encode()
    )
    try:
        if tokenizer.is_fast:
            # Vocabulary, merges, normalizer, pre-tokenizer and added tokens. What an earlier call
            # set for cutting and padding is in it too, and the next call sets that anew.
            contents = json.loads(tokenizer.backend_tokenizer.to_str())
            kept = {name: contents[name] for name in contents.keys() - {"truncation", "padding"}}
            digest.update(json.dumps(kept, sort_keys=True).encode())
        else:
            _add_files_of(tokenizer, digest)
    except Exception as error:  # a pre-tokenizer written in Python, a class that cannot be saved
        logger.debug("the tokenizer cannot be fingerprinted, so nothing is cached: %s", error)
        return None
    return digest.hexdigest()


def _add_files_of(tokenizer: PreTrainedTokenizerBase, digest: Any) -> None:
    """Hash the files a slow tokenizer is made from: vocabulary, merges or model, and settings."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder)} {len(content)} ".encode())
            digest.update(content)


def _read(path: Path) -> TokenStream | None:
    """A stream that is there and whole, or None."""
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in ("tokens", "starts")}
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be read (%s); tokenizing again", path, error)
        return None
    if about != _about(found):
        logger.warning("%s is damaged: its checksum differs; tokenizing again", path)
        return None
    return TokenStream(found["tokens"].long(), found["starts"].long())


def _about(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {"format": _FORMAT_VERSION, "xxh3_128": tensors_checksum(tensors.items())}


def _write(path: Path, stream: TokenStream) -> None:
    # No vocabulary is near 2^31, and half the bytes are read in half the time.
    tensors = {"tokens": stream.tokens.int(), "starts": stream.starts}
    try:
        with disk_errors_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_remains(path.parent)
        write_atomically(path, lambda place: save_file(tensors, place, metadata=_about(tensors)))
    except EnvironmentProblem as error:
        _say_not_kept(path.parent, error.cause)
    except (OSError, SafetensorError) as error:
        _say_not_kept(path.parent, str(error))
    else:
        logger.info("Tokens kept for the next run in %s", path)


def _remove_remains(directory: Path) -> None:
    """Remove what a killed process left half-written; nobody writes one file for a day."""
    for path in directory.glob(".*.safetensors.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD_SECONDS:
                path.unlink()


@cache
def _say_not_kept(directory: Path, reason: str) -> None:
    """Warn once a process: every data set of a notebook meets the same folder."""
    logger.warning("tokens are not kept in %s: %s", directory, reason)
