"""The embedded text: prose that every CPython installation carries, gathered at run time.

Two sources: the language reference that ``help()`` shows (``pydoc_data.topics``) and the docstrings
of the standard library, read from its source files with ``ast`` and never imported. A document is
one topic, or the docstrings of one module in source order under their qualified names.

The text follows the Python version that runs: another minor release has other topics, other modules
and other wording, so figures measured on it are only comparable within one version. A distribution
that leaves parts out (a missing ``tkinter``, say) gives a smaller corpus and no error.

This file knows nothing about tokens or models; read ``tokenizer.py`` next.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cleangpt.errors import EnvironmentProblem, UsageError

SPLITS: Final = ("train", "validation", "test")

# Folders that hold no prose of the library itself: installed packages, tests and their data,
# code tables, bundled third-party wheels, and the topics, which are read as data instead.
EXCLUDED_FOLDERS: Final = frozenset(
    {
        "__phello__",
        "__pycache__",
        "_bundled",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)

# In words. A shorter repeated paragraph is kept: "For example:" is style, not leaked content.
SHORTEST_UNIQUE_PARAGRAPH: Final = 5
WORDS_PER_RUN: Final = 8
SHORTEST_DOCUMENT: Final = 200  # characters


@dataclass(frozen=True)
class Document:
    """One topic of the language reference, or one module's docstrings.

    Args:
        name: ``topics/<topic>`` or ``library/<dotted module>``; decides the split.
        text: The cleaned text, paragraphs separated by one empty line.
    """

    name: str
    text: str

    @property
    def split(self) -> str:
        """Return "train", "validation" or "test", in about the proportion 90 : 5 : 5.

        A function of the name alone, so a document never changes sides when others come or go.
        """
        draw = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") % 100
        if draw < 90:
            return "train"
        return "validation" if draw < 95 else "test"


def builtin_texts(split: str) -> list[str]:
    """Return the texts of one split, one string per document, in a fixed order.

    Args:
        split: "train", "validation" or "test".

    Raises:
        UsageError: If ``split`` is another word.
        EnvironmentProblem: If this Python carries neither topics nor library sources.
    """
    if split not in SPLITS:
        raise UsageError(
            f"The built-in text has no split {split!r}.",
            f"Choose one of {', '.join(SPLITS)} with --dataset_split.",
        )
    return [document.text for document in builtin_documents() if document.split == split]


@functools.cache
def builtin_documents() -> tuple[Document, ...]:
    """Return every document of the corpus, sorted by name, without repeated text.

    Topics quote each other and modules copy docstrings, which would carry training text into the
    test split. Each paragraph therefore stays only in the longest document that has it, or nearly
    has it (compared without case, digits, punctuation and spacing), and a document that keeps
    almost nothing is dropped.

    Raises:
        EnvironmentProblem: If this Python carries neither topics nor library sources.
    """
    raw = sorted(
        [*_topic_documents(), *_library_documents(Path(sysconfig.get_path("stdlib")))],
        key=lambda document: (-len(document.text), document.name),
    )
    claimed: set[str] = set()
    kept = []
    for document in raw:
        text = _without_repeats(document.text, claimed)
        if len(text) >= SHORTEST_DOCUMENT:
            kept.append(Document(document.name, text))
    if not kept:
        raise EnvironmentProblem(
            "This Python carries no topics and no standard library sources to build text from.",
            "Name a text of your own with --dataset_name, or use a complete CPython installation.",
        )
    return tuple(sorted(kept, key=lambda document: document.name))


def corpus_fingerprint() -> str:
    """Return the SHA-256 of all names and texts: equal exactly when the corpus is equal."""
    digest = hashlib.sha256()
    for document in builtin_documents():
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return digest.hexdigest()


def _topic_documents() -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in topics.items():
        yield Document(f"topics/{name}", _clean(text))


def _library_documents(folder: Path) -> Iterator[Document]:
    for path in _source_files(folder):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        module = module.removesuffix(".__init__")
        sections = []
        for name, docstring in _docstrings(path):
            heading = f"{module}.{name}" if name else module
            sections.append(f"{heading}\n{_clean(docstring)}")
        if sections:
            yield Document(f"library/{module}", "\n\n".join(sections))


def _source_files(folder: Path) -> Iterator[Path]:
    """Walk ``folder`` in sorted order, so that the file system's order does not matter."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.is_dir():
            if entry.name not in EXCLUDED_FOLDERS and not entry.name.startswith("config-"):
                yield from _source_files(entry)
        elif entry.suffix == ".py":
            yield entry


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of the module ("" as name), its classes and functions."""
    try:
        source = path.read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return
        with warnings.catch_warnings():
            # Old library files may hold escapes that newer parsers warn about; not our business.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return
    yield from _docstrings_below(tree, "")


def _docstrings_below(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    named = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, named):
        prefix = f"{prefix}.{node.name}" if prefix else node.name
    if isinstance(node, named | ast.Module):
        docstring = ast.get_docstring(node, clean=False)
        # One word says nothing ("Deprecated"), and there are many of them.
        if docstring and len(docstring.split()) > 2:
            yield prefix, docstring
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                yield from _docstrings_below(child, prefix)


def _clean(text: str) -> str:
    """Remove indentation, control characters, drawn rules and repeated empty lines."""
    text = inspect.cleandoc(text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    text = re.sub(r"(?m)^[ \t]*([*=\-~^#_+.])\1{3,}[ \t]*$\n?", "", text)
    text = re.sub(r"(?m)[ \t]+$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _without_repeats(text: str, claimed: set[str]) -> str:
    """Return ``text`` without paragraphs found in ``claimed``, and add the kept ones to it.

    ``claimed`` holds runs of words, so a paragraph that was only re-wrapped or slightly reworded is
    found as well: it goes when half of its runs are known.
    """
    kept = []
    for paragraph in text.split("\n\n"):
        words = re.findall(r"[a-z]+", paragraph.lower())
        if len(words) >= SHORTEST_UNIQUE_PARAGRAPH:
            last = max(1, len(words) - WORDS_PER_RUN + 1)
            runs = [" ".join(words[start : start + WORDS_PER_RUN]) for start in range(last)]
            if 2 * sum(run in claimed for run in runs) >= len(runs):
                continue
            claimed.update(runs)
        kept.append(paragraph)
    return "\n\n".join(kept)
