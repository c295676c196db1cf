"""Whether two models mean the same by their token ids: maps of tokens are compared, never sizes.

A model may have more vocabulary rows than its tokenizer has tokens, padded to a multiple of 64 as a
rule. Such rows stand for no token and may be left out; tokens that differ never may. GGUF files
name them ``[PAD151700]``, after their ids, which is no token either. Knows nothing about models;
``teacher`` and those who load students use it.
"""

from collections.abc import Mapping
from typing import Any

from cleangpt.errors import InputError

_SHOWN = 3
_LONGEST_TOKEN = 40


def token_rows(tokenizer: Any) -> int:
    """The vocabulary rows that a tokenizer's tokens need: its largest id, and one."""
    return 1 + max(_without_placeholders(tokenizer.get_vocab()).values(), default=-1)


def check_same_tokens(
    own: Mapping[str, int], teachers: Mapping[str, int], name: str, remedy: str
) -> None:
    """Refuse two vocabularies in which an id stands for another token, or for none in one of them.

    Args:
        own: Token to id of the student's tokenizer.
        teachers: Token to id of the teacher's.
        name: The student, for the message.
        remedy: What to do about it.

    Raises:
        InputError: With the first ids that differ.
    """
    own, teachers = _without_placeholders(own), _without_placeholders(teachers)
    different = own.items() ^ teachers.items()
    if not different:
        return
    ids = sorted({index for _, index in different})
    theirs, ours = ({index: token for token, index in each.items()} for each in (teachers, own))
    named = [f"{i} ({_token(ours.get(i))}, not {_token(theirs.get(i))})" for i in ids[:_SHOWN]]
    raise InputError(
        f"the tokens of {name} are not the teacher's: {len(own)} and {len(teachers)} of them, and"
        f" {len(ids)} ids differ, first {', '.join(named)}; their predictions cannot be compared.",
        remedy,
    )


def _without_placeholders(vocabulary: Mapping[str, int]) -> dict[str, int]:
    return {token: index for token, index in vocabulary.items() if token != f"[PAD{index}]"}


def _token(token: str | None) -> str:
    return "no token" if token is None else repr(token[:_LONGEST_TOKEN])
