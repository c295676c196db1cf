"""Foreign text made safe for Markdown; ``cleangpt.safe_text`` is the step before."""

import re

from cleangpt.safe_text import clean_line, clean_text


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
