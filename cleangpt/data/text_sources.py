"""Documents by name: the embedded text, local files and folders, or a ``datasets`` name.

``load_texts`` is the only way in. It chooses the split and the text column, drops what is empty,
and says what it assumed in ``TextSource.notes``, which a command logs. Knows nothing about tokens;
read ``local_files`` and ``hub_texts`` for the formats, and ``windows`` for what comes next.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cleangpt.data.local_files import SUFFIXES, read_tables
from cleangpt.errors import InputError, UsageError
from cleangpt.hub import local_path

SPLITS = ("train", "validation", "test")
_HELD_OUT_FRACTION = 0.05
_FLAG = "--dataset_name"
_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class TextSource:
    """Documents and where they came from.

    Attributes:
        texts: Non-blank documents, in the order of the source; the embedded ones by their hash.
        name: The name they were asked for by.
        split: The split they belong to.
        text_column: The column they stood in; ``text`` for plain text.
        fingerprint: SHA-256 (hex) of the documents.
        notes: What was assumed or dropped, one sentence each; log them.
    """

    texts: list[str]
    name: str
    split: str
    text_column: str
    fingerprint: str
    notes: tuple[str, ...]


def texts_fingerprint(texts: Iterable[str]) -> str:
    """Return the SHA-256 of documents, their number and borders included."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def type_name(values: Iterable[Any]) -> str:
    """Return what a column holds: ``string``, ``int``, ``list``, ... or ``null``, or a mixture."""
    names = {
        "string" if isinstance(value, str) else type(value).__name__
        for value in values
        if value is not None
    }
    return " and ".join(sorted(names)) or "null"


def choose_text_column(types: dict[str, str], wanted: str | None) -> tuple[str, list[str]]:
    """Return the text column and the notes about the choice.

    The wanted column, if it is there; else the only column of strings. Without a wish, ``text``.

    Args:
        types: Type by column name; only ``string`` is text.
        wanted: The column asked for, if any.

    Raises:
        InputError: If the column is not text, or there is no single candidate.
    """
    listing = ", ".join(f"{name} ({kind})" for name, kind in types.items()) or "none"
    candidates = [name for name, kind in types.items() if kind == "string"]
    if wanted in types:
        if types[wanted] not in ("string", "null"):
            raise InputError(
                f"column {wanted!r} holds {types[wanted]}, not text; the columns are: {listing}.",
                f"Choose a text column with --dataset_text_column: {_alternatives(candidates)}.",
            )
        return wanted, []
    if wanted is None and "text" in candidates:
        return "text", []
    if len(candidates) == 1:
        only = candidates[0]
        said = (
            f"there is no column {wanted!r}; continuing with {only!r}, the only text column"
            if wanted
            else f"continuing with column {only!r}, the only text column"
        )
        return only, [said]
    absent = f"there is no column {wanted!r}" if wanted else "no text column was named"
    raise InputError(
        f"{absent}, and {len(candidates)} columns hold text; the columns are: {listing}.",
        f"Choose one with --dataset_text_column: {_alternatives(candidates)}.",
    )


def _alternatives(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none here; use another data set"


def _mend(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold and UTF-8 (and tokenizers) cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def clean_document(value: Any, row: int, column: str) -> str | None:
    """Return a document fit for a tokenizer; None if it is null or blank.

    Raises:
        InputError: If the value is neither text nor null.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(
            f"row {row} of column {column!r} is {type(value).__name__} {value!r}, not text.",
            "Mend or drop that row, or choose another column with --dataset_text_column.",
        )
    return _mend(value) if value.strip() else None


def clean_documents(values: Iterable[Any], column: str, max_samples: int) -> tuple[list[str], str]:
    """Return the first ``max_samples`` documents (0 = all), and a note on what was dropped.

    Raises:
        InputError: If a value is neither text nor null.
    """
    texts: list[str] = []
    nulls = blanks = 0
    for row, value in enumerate(values):
        text = clean_document(value, row, column)
        if text is not None:
            texts.append(text)
            if len(texts) == max_samples:
                break
        elif value is None:
            nulls += 1
        else:
            blanks += 1
    dropped = f"dropped {nulls} null and {blanks} blank documents" if nulls or blanks else ""
    return texts, dropped


def cut_splits(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return train, validation and test (90, 5 and 5 %), by document and always the same way.

    Documents are ranked by their hash, so equal ones land in one split and none is shared. Fewer
    than three different documents are all train.
    """
    keys = [hashlib.sha256(text.encode("utf-8")).digest() for text in texts]
    ranked = sorted(set(keys))
    held_out = max(1, round(_HELD_OUT_FRACTION * len(ranked))) if len(ranked) >= 3 else 0
    validation, test = set(ranked[:held_out]), set(ranked[held_out : 2 * held_out])
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for key, text in zip(keys, texts, strict=True):
        split = "validation" if key in validation else "test" if key in test else "train"
        splits[split].append(text)
    return splits


def split_of_document(text: str) -> str:
    """Return the split of one document among those of a source that has none, as a stream cuts it.

    By the document's hash alone, with the shares of ``cut_splits``, which knows all documents and
    so meets the shares exactly: near the borders the two may differ.
    """
    rank = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64
    return SPLITS[1 + int(rank / _HELD_OUT_FRACTION)] if rank < 2 * _HELD_OUT_FRACTION else "train"


def hold_out(
    texts: list[str], name: str, split: str, max_samples: int, notes: list[str]
) -> list[str]:
    """Return one split of data that has none of its own, and note the cut.

    Args:
        texts: All documents.
        name: What to call the data in messages.
        split: One of ``SPLITS``.
        max_samples: First so many documents of the split; 0 for all.
        notes: Gets one more sentence.

    Raises:
        InputError: If there are too few documents for that split, or the split is unknown.
    """
    if split not in SPLITS:
        raise no_such_split(name, split, SPLITS)
    splits = cut_splits(texts)
    sizes = ", ".join(f"{each} {len(splits[each])}" for each in SPLITS)
    notes.append(f"{name} has no splits of its own; cut by document into {sizes}")
    if texts and not splits[split]:
        raise InputError(
            f"{name} holds {len(texts)} documents, too few to hold out a {split} split.",
            "Use more text, a folder with train*, validation* and test* files, or the split train "
            "(--dataset_split train).",
        )
    return splits[split][: max_samples or None]


def split_of_file(path: Path, root: Path) -> str | None:
    """Return the split that a file's name (``train-0001.jsonl``) or its folder's name says."""
    for part in path.relative_to(root).parts:
        first = re.split(r"[^A-Za-z]", part, maxsplit=1)[0].lower()
        if first in _SPLIT_NAMES:
            return _SPLIT_NAMES[first]
    return None


def _files_under(folder: Path) -> list[Path]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise InputError(
            f"folder {folder} has no file that ends in {', '.join(SUFFIXES)}.",
            f"Give {_FLAG} a folder of such files, one such file, or a `datasets` name.",
        )
    return found


def no_such_split(name: str, split: str, known: Iterable[str]) -> InputError:
    """Return the error for a split that a data set does not have."""
    splits = ", ".join(known)
    return InputError(
        f"data set {name!r} has no split {split!r}; its splits are: {splits}.",
        f"Choose one of them with --dataset_split: {splits}.",
    )


def files_of_split(path: Path, split: str) -> tuple[list[Path], bool, list[str]]:
    """Return the files of a path to read, whether they still have to be cut, and notes."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"{path} ends in {path.suffix or 'nothing'}, which is not a known format.",
                f"Give {_FLAG} a file that ends in {', '.join(SUFFIXES)}.",
            )
        return [path], True, []
    files = _files_under(path)
    by_split: dict[str, list[Path]] = {}
    for each in files:
        by_split.setdefault(split_of_file(each, path) or "", []).append(each)
    others = by_split.pop("", [])
    if not by_split:
        return others, True, []
    if split not in by_split:
        raise no_such_split(str(path), split, [each for each in SPLITS if each in by_split])
    notes = [f"{len(others)} files whose names name no split were left out"] if others else []
    return by_split[split], False, notes


def _load_local(
    path: Path, split: str, text_column: str | None, max_samples: int
) -> tuple[list[str], str, list[str]]:
    if split not in SPLITS:
        raise no_such_split(str(path), split, SPLITS)
    files, has_one_split, notes = files_of_split(path, split)
    table = read_tables(files)
    if not any(table.values()):
        raise no_rows(str(path), split)
    types = {name: type_name(values) for name, values in table.items()}
    column, said = choose_text_column(types, text_column)
    texts, dropped = clean_documents(table[column], column, 0 if has_one_split else max_samples)
    notes += said + ([dropped] if dropped else [])
    if has_one_split:
        texts = hold_out(texts, str(path), split, max_samples, notes)
    return texts, column, notes


def no_rows(name: str, split: str) -> InputError:
    """Return the error for data without a document."""
    return InputError(
        f"data set {name!r}, split {split!r}, has no rows with text.",
        f"Check the file, the split (--dataset_split) and the column (--dataset_text_column), or "
        f"give {_FLAG} other data.",
    )


def _load_builtin(
    split: str, text_column: str | None, max_samples: int
) -> tuple[list[str], str, list[str]]:
    from cleangpt.builtin.corpus import builtin_texts

    if split not in SPLITS:
        raise no_such_split("builtin", split, SPLITS)
    column, notes = choose_text_column({"text": "string"}, text_column)
    # The corpus is sorted by name, library before topics, so its first documents are one kind of
    # text. In the order of their hashes any first part is a fair sample, and always the same one.
    texts = sorted(builtin_texts(split), key=lambda text: hashlib.sha256(text.encode()).digest())
    return texts[: max_samples or None], column, notes


def local_configuration(
    name: str, path: Path | None, config_name: str
) -> tuple[Path | None, list[str]]:
    """The folder inside a local folder that a configuration means, or the folder itself.

    Raises:
        UsageError: If there is no folder that could have configurations.
    """
    if path is None or not path.is_dir():
        raise UsageError(
            f"--dataset_config_name {config_name} cannot act on {name!r}: only named data sets and "
            "folders have configurations.",
            "Leave --dataset_config_name out.",
        )
    inside = Path(config_name).name == config_name and config_name not in ("", "..")
    if inside and (path / config_name).is_dir():
        return path / config_name, []
    return path, [f"{name} has no folder {config_name!r}; using the whole folder"]


def is_saved_dataset(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return any((path / each).is_file() for each in ("dataset_dict.json", "state.json"))


def load_texts(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str | None = None,
    max_samples: int = 0,
    streaming: bool = False,
) -> TextSource:
    """Return the documents of one split of a data set.

    Local data has no network in its path. A file, or a folder without ``train*``, ``validation*``
    or ``test*`` files, is cut into three splits by ``cut_splits``. A long ``.txt`` is cut into
    documents first (``local_files.read_tables``).

    Args:
        name: ``builtin``; a ``.txt``, ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; a
            folder of them, or one written by ``save_to_disk``; or a name for ``load_dataset``.
        config_name: Configuration of a ``datasets`` name; of a local folder, the folder inside it
            of that name, if there is one.
        split: ``train``, ``validation`` or ``test``, or what the ``datasets`` name offers.
        text_column: The column of documents; None takes ``text``, or the only column of strings.
        max_samples: Use the first so many documents; 0 takes all.
        streaming: Read no further than that, as ``streams`` cuts and splits documents.

    Raises:
        UsageError: If ``max_samples`` is negative or ``config_name`` cannot act.
        InputError: If the data cannot be used.
        EnvironmentProblem: If a name is not cached and cannot be fetched.
    """
    if max_samples < 0:
        raise UsageError(f"max_samples is {max_samples}.", "Set --max_samples to 0 (all) or more.")
    if streaming:
        from cleangpt.data.streams import first_texts, open_stream

        stream = open_stream(name, config_name=config_name, split=split, text_column=text_column)
        return first_texts(stream, max_samples)
    path = None if name == "builtin" else local_path(name, flag=_FLAG, suffixes=SUFFIXES)
    said: list[str] = []
    if config_name is not None and (name == "builtin" or path is not None):
        path, said = local_configuration(name, path, config_name)
    is_saved = path is not None and is_saved_dataset(path)
    if name == "builtin":
        texts, column, notes = _load_builtin(split, text_column, max_samples)
    elif path is not None and not is_saved:
        texts, column, notes = _load_local(path, split, text_column, max_samples)
    else:
        from cleangpt.data.hub_texts import load_named

        texts, column, notes = load_named(name, path, config_name, split, text_column, max_samples)
    if not texts:
        raise no_rows(name, split)
    return TextSource(texts, name, split, column, texts_fingerprint(texts), (*said, *notes))
