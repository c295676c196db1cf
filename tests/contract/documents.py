"""Reads the code blocks and commands of a Markdown page, so that tests can run them as printed."""

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S
)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*$")
# Code that a page names: a file, and what it defines.
NAMED_CODE = re.compile(r"`([\w/]+\.py)::([\w.]+)`")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, text, first line in the page, and whether it is to be run."""

    language: str
    code: str
    line: int
    is_run: bool


def read_blocks(page: Path, *languages: str) -> list[Block]:
    """The page's blocks in order; a ``<!-- not run: reason -->`` before one exempts it."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            language=match["language"],
            code=match["code"],
            line=text.count("\n", 0, match.start()) + 2,
            is_run=not NOT_RUN.search(text[: match.start()]),
        )
        for match in FENCE.finditer(text)
        if match["language"] in languages
    ]


def prose(page: Path) -> str:
    """The page's text without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def headings(page: Path) -> list[str]:
    """The page's headings, as they are shown."""
    shown = re.findall(r"^#{1,6} (.+?)\s*$", prose(page), re.M)
    return [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("`", "") for text in shown]


def commands_in(block: Block) -> list[list[str]]:
    """The shell commands of a block as argument lists; comments and redirections are left out."""
    joined = re.sub(r"\\\n\s*", " ", block.code)
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    commands = []
    for line in lines:
        words = shlex.split(line, comments=True)
        for is_operator, part in itertools.groupby(words, lambda word: word in {"&&", "|", ";"}):
            if not is_operator:
                commands.append(list(itertools.takewhile(lambda word: word != ">", part)))
    return commands


def module_call(words: list[str]) -> tuple[str, list[str]] | None:
    """``python -m MODULE ARGS`` as (module, arguments); None for any other command."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if len(words) < 3 or not Path(words[0]).name.startswith("python") or words[1] != "-m":
        return None
    return words[2], words[3:]


def make_targets(words: list[str]) -> list[str]:
    """The targets of a ``make`` command; empty for any other command."""
    if not words or words[0] != "make":
        return []
    return [word for word in words[1:] if "=" not in word and not word.startswith("-")]


def run_block(
    block: Block, namespace: dict[str, object], page: Path, code: str | None = None
) -> None:
    """Execute a Python block in a namespace; a traceback shows the page and its line."""
    source = "\n" * (block.line - 1) + (block.code if code is None else code)
    exec(compile(source, str(page), "exec"), namespace)
