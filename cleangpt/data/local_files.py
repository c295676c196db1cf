"""Local text files into tables: columns of raw values, with errors that name file and line.

Reads ``.txt``, ``.jsonl``, ``.json``, ``.csv`` and ``.parquet``. A ``.txt`` file has one column,
``text``. Knows nothing about splits or which column is wanted; read ``text_sources`` next.
"""

import csv
import importlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cleangpt.errors import InputError

Table = dict[str, list[Any]]

# Documents that a long .txt is cut into: long enough to give full windows of context, short enough
# that a held-out twentieth is several documents.
_DOCUMENT_CHARACTERS = 4_000
_SMALLEST_DOCUMENT = 200
_DOCUMENTS_WANTED = 40


def _read_text(path: Path) -> str:
    """Return a file's text: UTF-8 with or without a mark, any line ends."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} line {line}: byte 0x{data[error.start]:02x} is not UTF-8.",
            "Convert the file to UTF-8, for example with: iconv -f latin1 -t utf-8.",
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _pieces(line: str, limit: int) -> Iterator[str]:
    """Cut a line before spaces, where it is too long."""
    start = 0
    while len(line) - start > limit:
        cut = line.rfind(" ", start + 1, start + limit)
        end = cut if cut > start else start + limit
        yield line[start:end]
        start = end
    yield line[start:]


def _parts(lines: Iterable[str], limit: int) -> Iterator[str]:
    """Whole paragraphs up to ``limit`` characters; of a longer one the lines, and their pieces."""
    held: list[str] = []
    size = 0  # of the paragraph so far; its lines are held back until it is known to be long
    for line in lines:
        if size and line.strip(" \t") == "\n":
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
        if size > limit:
            for each in held:
                yield from _pieces(each, limit)
            held = []
    yield "".join(held)


def cut_lines(lines: Iterable[str], target: int) -> Iterator[str]:
    """Yield documents of about ``target`` characters from lines with their ends, nothing lost.

    Holds no more than a document and a paragraph at a time.
    """
    current: list[str] = []
    size = 0
    for part in _parts(lines, 2 * target):
        current.append(part)
        size += len(part)
        if size >= target:
            yield "".join(current)
            current, size = [], 0
    if size:
        yield "".join(current)


def document_size(characters: int) -> int:
    """The characters per document that a text of so many is cut into."""
    return max(_SMALLEST_DOCUMENT, min(_DOCUMENT_CHARACTERS, characters // _DOCUMENTS_WANTED))


def cut_into_documents(text: str) -> list[str]:
    """Return one long text as documents of about 4,000 characters, in order, nothing lost.

    Cuts fall at blank lines if there are any, else at line ends, else before spaces. A short text
    gives shorter documents, so that about forty remain to be split, but never less than about 200
    characters each.
    """
    return list(cut_lines(io.StringIO(text, newline="\n"), document_size(len(text))))


def _rows_to_table(rows: Iterable[dict[str, Any]]) -> Table:
    table: Table = {}
    for index, row in enumerate(rows):
        for name in row.keys() - table.keys():
            table[name] = [None] * index
        for name, values in table.items():
            values.append(row.get(name))
    return table


def _bad_json(path: Path, line: int, problem: str) -> InputError:
    return InputError(
        f"{path} line {line}: {problem}.",
        'Write one JSON object per line (.jsonl), such as {"text": "..."}, or an array of objects '
        "(.json).",
    )


def _why(error: Exception) -> str:
    """Numbers of thousands of digits and brackets in brackets have errors of their own."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _json_lines(path: Path, text: str) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad_json(path, number, f"not valid JSON ({_why(error)})") from None
        if not isinstance(row, dict):
            raise _bad_json(path, number, f"a {type(row).__name__} where an object is expected")
        yield row


def _read_json(path: Path) -> Table:
    text = _read_text(path)
    if path.suffix == ".jsonl":
        return _rows_to_table(_json_lines(path, text))
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line, in a file that ends in .json
            return _rows_to_table(_json_lines(path, text))
        raise _bad_json(path, error.lineno, f"not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise _bad_json(path, 1, f"not valid JSON ({_why(error)})") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise _bad_json(path, 1, "not an array of objects")
    return _rows_to_table(content)


def _read_csv(path: Path) -> Table:
    # Line ends inside quotes belong to the value, so the text keeps what the csv module sees.
    lines = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    csv.field_size_limit(2**31 - 1)
    rows: list[dict[str, Any]] = []
    try:
        header = next(lines, [])
        for row in lines:
            if len(row) > len(header):
                raise csv.Error(f"{len(row)} values under {len(header)} column names")
            if row:
                rows.append(dict(zip(header, row, strict=False)))
    except csv.Error as error:
        raise InputError(
            f"{path} line {lines.line_num}: {error}.",
            "Write comma-separated values under a header line, with quotes around text.",
        ) from None
    return {name: _as_numbers([row.get(name) for row in rows]) for name in header}


def _as_numbers(values: list[Any]) -> list[Any]:
    """Return numbers if every value of a CSV column is one: such a column is not text."""
    try:
        return [float(value) if value else None for value in values]
    except ValueError:
        return values


def _read_parquet(path: Path) -> Table:
    parquet = importlib.import_module("pyarrow.parquet")  # comes with `datasets`; has no types
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a readable parquet file: {' '.join(str(error).split())}",
            "Write the file again, or give another one to --dataset_name.",
        ) from None
    columns: Table = table.to_pydict()
    return columns


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES = (".txt", *_READERS)


def read_tables(paths: list[Path]) -> Table:
    """Return the rows of all files, in order, as one table; a column a file lacks is null there.

    A ``.txt`` file is one document (column ``text``). If there are fewer than twenty of them and
    nothing else, each is cut into documents by ``cut_into_documents``, so that they can be split.

    Args:
        paths: Files with one of ``SUFFIXES``.

    Raises:
        InputError: If a file is damaged, not UTF-8 or not in its format.
    """
    few = len(paths) < 20 and all(path.suffix.lower() == ".txt" for path in paths)
    merged: Table = {}
    num_rows = 0
    for path in paths:
        if path.suffix.lower() == ".txt":
            text = _read_text(path)
            table: Table = {"text": cut_into_documents(text) if few else [text]}
        else:
            table = _READERS[path.suffix.lower()](path)
        size = max((len(values) for values in table.values()), default=0)
        for name in table.keys() - merged.keys():
            merged[name] = [None] * num_rows
        for name, values in merged.items():
            values.extend(table.get(name, [None] * size))
        num_rows += size
    return merged
