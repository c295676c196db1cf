"""The documents of our tasks, made from the built-in text; the same on each run of one Python.

The harness loads this file by its place, for the functions that the task files name.
"""

import hashlib
import re
from typing import Any, Final

from cleangpt.builtin.corpus import builtin_texts

MOST_SENTENCES: Final = 400
CHOICES: Final = 4

_SENTENCE = re.compile(r"(?:^|(?<=[.!?] ))[A-Z][\w ,'()-]{40,200} ([A-Za-z]{4,})\.(?= |$)")


def documents(**_: Any) -> dict[str, Any]:
    """Every held-out document, whole."""
    return _test_split([{"text": text} for text in builtin_texts("test")])


def cloze(**_: Any) -> dict[str, Any]:
    """Sentences without their last word, and four words to choose from."""
    return _test_split(cloze_items(builtin_texts("test")))


def cloze_items(texts: list[str]) -> list[dict[str, Any]]:
    """Return the questions that texts give, at most ``MOST_SENTENCES`` of them.

    Which sentences, which other words and where the right one stands are decided by hashes of the
    sentence, so that they depend on nothing else.
    """
    ends = {
        match[0]: match[1]
        for text in texts
        for paragraph in text.split("\n\n")
        for match in _SENTENCE.finditer(" ".join(paragraph.split()))
    }
    words = sorted({word.lower() for word in ends.values()})
    items = []
    for sentence in sorted(ends, key=_hash)[:MOST_SENTENCES]:
        word = ends[sentence]
        others = sorted(
            (other for other in words if other != word.lower()),
            key=lambda other: _hash(f"{sentence}\n{other}"),
        )[: CHOICES - 1]
        answer = int(_hash(sentence), 16) % CHOICES
        choices = [*others[:answer], word, *others[answer:]]
        beginning = sentence.removesuffix(f" {word}.")
        items.append({"beginning": beginning, "choices": choices, "answer": answer})
    return items


def text_of(item: dict[str, Any]) -> str:
    """The document."""
    return str(item["text"])


def beginning_of(item: dict[str, Any]) -> str:
    """The sentence without its last word."""
    return str(item["beginning"])


def choices_of(item: dict[str, Any]) -> list[str]:
    """The words to choose from."""
    return list(item["choices"])


def answer_of(item: dict[str, Any]) -> int:
    """Where the right word stands."""
    return int(item["answer"])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _test_split(items: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(items)}
