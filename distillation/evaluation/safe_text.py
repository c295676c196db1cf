"""Make foreign text safe to show: in a terminal, in Markdown and, after escaping, in HTML.

Generated and evaluated text is not ours. It may hold terminal escape codes, characters that reverse
the reading direction of what follows, or a line of a megabyte.
"""

import re
import unicodedata

_TERMINAL_CODES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor moves
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\Z)"  # titles, links, device strings
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_DIRECTION_MARKS = set(range(0x202A, 0x202F)) | set(range(0x2066, 0x206A)) | {0x200E, 0x200F}


def clean_text(text: str, limit: int = 4000) -> str:
    """Return text without escape codes, control and direction characters, cut to ``limit``.

    Example:
        >>> clean_text("a" + chr(27) + "[31mred" + chr(7))
        'ared'
    """
    cut = text[: limit + 1000]  # bounds the work; codes that are removed do not count
    cleaned = "".join(map(_clean_character, _TERMINAL_CODES.sub("", cut)))
    if len(cleaned) > limit or len(text) > len(cut):
        return f"{cleaned[:limit]} ... [cut: {len(text)} characters]"
    return cleaned


def clean_line(text: str, limit: int = 200) -> str:
    """Return :func:`clean_text` on one line, for names and table cells."""
    line = " ".join(clean_text(text[: 2 * limit + 1000], 2 * limit).split())
    return line if len(line) <= limit else f"{line[: limit - 3].rstrip()}..."


def _clean_character(character: str) -> str:
    if character in "\n\t":
        return character
    category = unicodedata.category(character)
    if category == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    if category == "Cc" or ord(character) in _DIRECTION_MARKS:
        return ""
    return character


def markdown_line(text: str, limit: int = 200) -> str:
    """Return one line that Markdown shows as it is, in a table too."""
    line = clean_line(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", line)


def markdown_block(text: str) -> str:
    """Return a code block whose fence is longer than any run of backticks in the text.

    Example:
        >>> markdown_block("a ``` b").splitlines()[0]
        '````text'
    """
    cleaned = clean_text(text)
    longest = max((len(run) for run in re.findall(r"`+", cleaned)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{cleaned}\n{fence}"
