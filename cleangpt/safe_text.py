"""Foreign text made safe to show: in a terminal, and as the first step for Markdown and HTML.

Texts, prompts, generations, tensor names, and names of files and models are not ours. They may hold
terminal escape codes, characters that reverse the reading direction of what follows, line ends that
look like a new message, or a line of a megabyte. Standard library only: the commands need it at
once.
"""

import logging
import re
import unicodedata

_TERMINAL_CODES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor moves
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\Z)"  # titles, links, device strings
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_UNUSUAL = re.compile(r"[^\n\t -~]")
_DIRECTION_MARKS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_TAGS = range(0xE0000, 0xE0080)  # letters that no font shows
_MESSAGE_LIMIT = 20_000


def clean_text(text: str, limit: int = 4000) -> str:
    """Return text without escape codes, control and direction characters, cut to ``limit``.

    Example:
        >>> clean_text("a" + chr(27) + "[31mred" + chr(7))
        'ared'
    """
    cut = text[: limit + 1000]  # bounds the work; codes that are removed do not count
    cleaned = _UNUSUAL.sub(_clean_character, _TERMINAL_CODES.sub("", cut))
    if len(cleaned) > limit or len(text) > len(cut):
        return f"{cleaned[:limit]} ... [cut: {len(text)} characters]"
    return cleaned


def clean_line(text: str, limit: int = 200) -> str:
    """Return :func:`clean_text` on one line, for names and table cells."""
    line = " ".join(clean_text(text[: 2 * limit + 1000], 2 * limit).split())
    return line if len(line) <= limit else f"{line[: limit - 3].rstrip()}..."


def clean_message(text: str, limit: int = 2000) -> str:
    """Return :func:`clean_text` on one line with its spaces, for messages with names in."""
    return clean_text(text, limit).replace("\n", " ").replace("\t", " ")


def _clean_character(found: re.Match[str]) -> str:
    character = found[0]
    number, category = ord(character), unicodedata.category(character)
    if category == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    if category in ("Zl", "Zp"):  # the line ends of Unicode
        return " "
    if category == "Cc" or number in _DIRECTION_MARKS or number in _TAGS:
        return ""
    return character


class SafeFormatter(logging.Formatter):
    """Writes a record as text for a terminal; lines after its first are set in.

    So text from elsewhere, whoever logs it, can neither move the cursor nor pose as a message of
    its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's message and traceback, cleaned."""
        return clean_text(super().format(record), _MESSAGE_LIMIT).replace("\n", "\n    ")
