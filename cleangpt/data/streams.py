"""Documents of a data set that need not fit anywhere, read one after the other.

``open_stream`` takes the names that ``text_sources.load_texts`` takes, and reads through
``datasets`` in its streaming mode. Of a document it knows the place, so that reading can begin
there again: the state that ``datasets`` gives before some rows, and how many of them to pass over.
Then nothing before that state is read again, but within a file ``datasets`` passes over what was
read before: seconds per gigabyte. Lines of a ``.txt`` are put together to documents as
``local_files`` does, so there all of the file before the place is read again, and none of it
tokenized. Knows nothing about tokens; read ``streamed_windows`` next.
"""

import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from cleangpt.data.local_files import SUFFIXES, cut_lines, document_size
from cleangpt.data.text_sources import (
    SPLITS,
    TextSource,
    choose_text_column,
    clean_document,
    files_of_split,
    is_saved_dataset,
    local_configuration,
    no_rows,
    no_such_split,
    split_of_document,
    texts_fingerprint,
    type_name,
)
from cleangpt.errors import CleanGPTError, InputError, UsageError
from cleangpt.hub import local_path, refused

_FLAG = "--dataset_name"
_ROWS_AT_ONCE = 1000
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"encoding": "utf-8-sig", "keep_linebreaks": True}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    # "NA" is a word here, as it is where the file is read at once.
    ".csv": ("csv", {"keep_default_na": False}),
    ".parquet": ("parquet", {"batch_size": _ROWS_AT_ONCE}),
}


class StreamPosition(NamedTuple):
    """Where a document stands. JSON keeps it, as a list.

    Args:
        part: Index of the file, or 0.
        state: What ``datasets`` gives for a place at or before it; None is the part's beginning.
        items: Rows between that place and the document; of a ``.txt``, documents.
    """

    part: int = 0
    state: dict[str, Any] | None = None
    items: int = 0


@dataclass(frozen=True)
class _Part:
    """One file, or all of a named data set.

    Args:
        name: What messages call it.
        size: Bytes of a file, to tell one data set from another; 0 of a named data set.
        open: Makes an ``IterableDataset``.
        document_size: Characters to a document of a ``.txt``; 0 where a row is a document.
    """

    name: str
    size: int
    open: Callable[[], Any]
    document_size: int = 0

    def items(self, column: str, place: StreamPosition) -> Iterator[tuple[StreamPosition, Any]]:
        """Rows or documents from a place on, each with its own."""
        if self.document_size:
            lines = (line for _, rows in self._batches("text", None) for line in rows)
            documents = enumerate(cut_lines(lines, self.document_size))
            for index, text in islice(documents, place.items, None):
                yield StreamPosition(place.part, None, index), text
            return
        first = place.items
        for state, rows in self._batches(column, place.state):
            for index in range(min(first, len(rows)), len(rows)):
                yield StreamPosition(place.part, state, index), rows[index]
            first = max(0, first - len(rows))

    def head(self) -> dict[str, str] | None:
        """The types of the columns, from the first rows; None if there are none."""
        with _explained(self):
            rows = next(iter(self.open().iter(batch_size=_ROWS_AT_ONCE)), None)
        return rows and {name: type_name(values) for name, values in rows.items()}

    def _batches(self, column: str, state: Any) -> Iterator[tuple[Any, list[Any]]]:
        """Lists of rows, each with the state before it."""
        with _explained(self):
            dataset = self.open()
            if state is not None:
                dataset.load_state_dict(state)
            batches = dataset.iter(batch_size=_ROWS_AT_ONCE)
        while True:
            with _explained(self):
                rows = next(batches, None)
            if rows is None:
                return
            values = list(rows.values())
            yield state, rows.get(column, [None] * len(values[0]) if values else [])
            state = dataset.state_dict()


@contextmanager
def _explained(part: _Part) -> Iterator[None]:
    """Turn what ``datasets`` raises into one line of cause and one of remedy."""
    try:
        yield
    except CleanGPTError:
        raise
    except Exception as error:
        if not part.size:
            raise refused("data set", part.name, error, flag=_FLAG) from error
        lines = " ".join(str(error).split())[:200]
        raise InputError(
            f"{part.name} cannot be read: {lines or type(error).__name__}",
            "Mend the file (UTF-8; .jsonl and .json: one object per line), or leave --streaming"
            " out: errors then name the line.",
        ) from error


@dataclass(frozen=True)
class TextStream:
    """Documents that are read when they are asked for.

    Attributes:
        parts: Where they stand, in order.
        name: The name they were asked for by.
        split: The split they belong to.
        text_column: The column they stand in; ``text`` for plain text.
        is_cut: Whether the documents of other splits stand between them.
        notes: What was assumed, one sentence each; log them.
    """

    parts: tuple[_Part, ...]
    name: str
    split: str
    text_column: str
    is_cut: bool
    notes: tuple[str, ...]

    @property
    def identity(self) -> list[Any]:
        """What tells this data from other data without reading it; JSON keeps it."""
        files = [[Path(part.name).name, part.size] for part in self.parts]
        return [self.split, self.text_column, self.is_cut, files]

    def documents(
        self, place: StreamPosition | None = None
    ) -> Iterator[tuple[StreamPosition, str]]:
        """Yield the non-blank documents from a place on, each with its own.

        Raises:
            InputError: If a file is damaged, or a row is neither text nor null.
            EnvironmentProblem: If a data set on the hub cannot be read on.
        """
        first = place or StreamPosition()
        for index in range(first.part, len(self.parts)):
            start = first if index == first.part else StreamPosition(index)
            for found, value in self.parts[index].items(self.text_column, start):
                text = clean_document(value, found.items, self.text_column)
                if text is None or (self.is_cut and split_of_document(text) != self.split):
                    continue
                yield found, text


def open_stream(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str | None = None,
) -> TextStream:
    """Find the documents of one split of a data set, and read none of them yet.

    Local data without splits of its own is cut by each document's hash, 90, 5 and 5 %. A ``.txt``
    is cut into documents of about 4,000 characters, also where it is one of many.

    Args:
        name: A ``.txt``, ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; a folder of them, or
            one written by ``save_to_disk``; or a name for ``load_dataset``.
        config_name: Configuration of a ``datasets`` name, or folder inside a local folder.
        split: ``train``, ``validation`` or ``test``, or what the ``datasets`` name offers.
        text_column: The column of documents; None takes ``text``, or the only column of strings.

    Raises:
        UsageError: For ``builtin``, which has nothing to stream, or a configuration of a file.
        InputError: If the data cannot be used, or only at once.
        EnvironmentProblem: If a name is not cached and cannot be fetched.
    """
    if name == "builtin":
        raise UsageError(
            "the built-in text is a few megabytes in memory; there is nothing to stream.",
            f"Leave --streaming out, or give {_FLAG} a file, a folder or a `datasets` name.",
        )
    path = local_path(name, flag=_FLAG, suffixes=SUFFIXES)
    notes: list[str] = []
    if path is not None and config_name is not None:
        path, notes = local_configuration(name, path, config_name)
    if path is None or is_saved_dataset(path):
        return _named(name, path, config_name, split, text_column, notes)
    if split not in SPLITS:
        raise no_such_split(name, split, SPLITS)
    files, is_cut, said = files_of_split(path, split)
    parts = tuple(_file(file) for file in files if file.stat().st_size)
    column, chosen = _column(name, split, parts, text_column)
    if is_cut:
        said.append(f"{name} has no splits of its own; each document's hash says which it is in")
    return TextStream(parts, name, split, column, is_cut, (*notes, *said, *chosen))


def first_texts(stream: TextStream, count: int) -> TextSource:
    """Return the first documents of a stream, as ``load_texts`` returns them.

    Raises:
        UsageError: If ``count`` is not positive.
        InputError: If there is no document.
    """
    if count < 1:
        raise UsageError(
            "a stream is read as far as is asked for, and no number of documents is given.",
            "Set --max_samples, for example to 200.",
        )
    texts = [text for _, text in islice(stream.documents(), count)]
    if not texts:
        raise no_rows(stream.name, stream.split)
    mark = texts_fingerprint(texts)
    return TextSource(texts, stream.name, stream.split, stream.text_column, mark, stream.notes)


def _named(
    name: str,
    path: Path | None,
    config_name: str | None,
    split: str,
    text_column: str | None,
    notes: list[str],
) -> TextStream:
    from cleangpt.data.hub_texts import column_types, open_named, open_saved

    if path is None:
        opened, is_cut = open_named(name, config_name, split, streaming=True), False
        part = _Part(name, 0, partial(open_named, name, config_name, split, streaming=True))
    else:
        saved, is_cut = open_saved(path, split)
        opened = saved.to_iterable_dataset()
        part = _Part(name, max(1, len(saved)), saved.to_iterable_dataset)
    if opened.features:
        column, chosen = choose_text_column(column_types(opened), text_column)
    else:
        column, chosen = _column(name, split, (part,), text_column)
    return TextStream((part,), name, split, column, is_cut, (*notes, *chosen))


def _file(path: Path) -> _Part:
    if path.suffix.lower() == ".json":
        _check_lines(path)
    size = path.stat().st_size
    # As many characters where all are ASCII; the size of a document is no more exact than that.
    per_document = document_size(size) if path.suffix.lower() == ".txt" else 0
    return _Part(str(path), size, partial(_open_file, path), per_document)


def _open_file(path: Path) -> Any:
    import datasets

    kind, settings = _FORMATS[path.suffix.lower()]
    files = {"train": [glob.escape(str(path))]}
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **settings)


def _check_lines(path: Path) -> None:
    """Refuse a JSON array: its end must be read before anything of it is known."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        raise InputError(
            f"{path} is one JSON array, which can only be read at once.",
            "Write one object per line (for example: jq -c '.[]' FILE > FILE.jsonl), or leave"
            " --streaming out.",
        )


def _column(
    name: str, split: str, parts: tuple[_Part, ...], wanted: str | None
) -> tuple[str, list[str]]:
    """The text column, from the first rows of one file of each format."""
    kinds = {Path(part.name).suffix.lower(): part for part in reversed(parts) if part.size}
    types: dict[str, str] = {}
    for part in kinds.values() or parts:
        types |= part.head() or {}
    if not types:
        raise no_rows(name, split)
    return choose_text_column(types, wanted)
