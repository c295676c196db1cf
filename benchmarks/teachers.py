"""Which families of teachers work: the page ``docs/teachers.md``.

    python -m benchmarks.teachers
    python -m benchmarks.teachers gpt2 llama qwen2.gguf

The first tries every family, and every architecture of GGUF files, and writes the page (three
minutes); named ones are only printed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cleangpt.cli import CommandParser, run_command

if TYPE_CHECKING:
    from benchmarks.families import Finding

PAGE = Path("docs/teachers.md")
HEADER = """# Teachers

Written by `python -m benchmarks.teachers`, with transformers {version}. Every family of causal
language models that transformers ships is built tiny (random weights), saved, loaded by
`load_teacher`, looked at block by block, and distilled: blocks, head and polish. So this page says
whether a family's structure is understood. Of families that also have encoders, it is the causal
decoder that is built (`is_decoder`); their usual checkpoints (BERT, BART, T5) are refused.

{works} of {all} families work, {refused} are refused, {failing} fail in their own code, and
{untried} cannot be built small by our rules.

A family that is not here works if its blocks are the outermost `ModuleList` as long as
`config.num_hidden_layers`, hold attention heads, and are followed by at most a norm and a head. The
columns are the largest differences, as a share of the largest value: of logits computed from the
last block's kept state on, of a block that runs alone on kept states, and of the states of windows
padded on the left or right.

"""
GGUF_HEADER = """## GGUF files

Every architecture of causal language models that transformers {version} says it reads from GGUF
files: a tiny random model is written as such a file (`benchmarks/gguf_files.py`), with vocabulary
and merges, and loaded and distilled as any teacher is. The number is the largest difference of
logits to the model that was written, as a share of the largest. Quantised files become plain
numbers when they are loaded. What a file does not state, or transformers does not read, is taken
from the family's first model: the sliding window of `phi3` and `starcoder2`, the width of a head of
`qwen3` and `gpt-oss`, that of the experts of `qwen2moe` and `qwen3moe`, the tables of `gemma4`, the
kind of `falcon`. A file whose weights then have other shapes is refused, and so is one with weights
that transformers does not read (`gpt-oss`, `gemma4`). A file with scaled
rotary positions (Llama 3.1 and later), which transformers does not read, is refused too: of such a
model, give the folder.

| architecture | verdict | logits | remark |
|---|---|---|---|
"""
GGUF_SUFFIX = ".gguf"


def main(argv: list[str] | None = None) -> None:
    """Try families, and write the page if all were tried.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
    """
    parser = CommandParser(prog="python -m benchmarks.teachers", description=__doc__)
    meaning = "model types, or architectures as qwen2.gguf (default: all, and the page)"
    parser.add_argument("families", nargs="*", help=meaning)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)

    from transformers.utils import logging as transformers_logging

    from benchmarks.families import FAMILIES, try_family, try_gguf
    from benchmarks.gguf_files import ARCHITECTURES

    findings, files = [], []
    transformers_logging.disable_progress_bar()
    for name in arguments.families or [*FAMILIES, *(f"{a}{GGUF_SUFFIX}" for a in ARCHITECTURES)]:
        if name.endswith(GGUF_SUFFIX):
            files.append(try_gguf(name.removesuffix(GGUF_SUFFIX)))
            print(gguf_row(files[-1]), flush=True)
        else:
            findings.append(try_family(name))
            print(row(findings[-1]), flush=True)
    if not arguments.families:
        PAGE.write_text(page(findings, files), encoding="utf-8")
        print(f"written: {PAGE}")


def page(findings: "list[Finding]", files: "Sequence[Finding]" = ()) -> str:
    """The whole page, by verdict: families, then GGUF files if they were tried."""
    import transformers

    verdicts = [finding.verdict for finding in findings]
    text = HEADER.format(
        version=transformers.__version__,
        works=verdicts.count("works"),
        all=len(findings),
        refused=verdicts.count("refused"),
        failing=verdicts.count("fails"),
        untried=verdicts.count("not tried"),
    )
    for verdict in ("works", "refused", "fails", "not tried"):
        if verdict not in verdicts:
            continue
        numbers = "logits | a block alone | padding | " if verdict == "works" else ""
        head = f"| family | {numbers}remark |"
        text += f"## {verdict.capitalize()}\n\n{head}\n|{'---|' * (head.count('|') - 1)}\n"
        text += "".join(row(finding) + "\n" for finding in findings if finding.verdict == verdict)
        text += "\n"
    return text.rstrip() + "\n" + (f"\n{gguf_section(files)}" if files else "")


def gguf_section(files: "Sequence[Finding]") -> str:
    """The page's part on GGUF files."""
    import transformers

    rows = "".join(f"{gguf_row(finding)}\n" for finding in files)
    return GGUF_HEADER.format(version=transformers.__version__) + rows


def gguf_row(finding: "Finding") -> str:
    """One line of the table of GGUF files."""
    number = "" if finding.logits is None else f"{finding.logits:.0e}"
    remark = finding.remark.replace("|", "/")
    return f"| {finding.family} | {finding.verdict} | {number} | {remark} |"


def row(finding: "Finding") -> str:
    """One line of a table."""
    numbers = [finding.logits, finding.advance, finding.padding]
    cells = [finding.family, *(f"{n:.0e}" for n in numbers if n is not None)]
    return f"| {' | '.join(cells)} | {finding.remark.replace('|', '/')} |"


if __name__ == "__main__":
    sys.exit(run_command(main))
