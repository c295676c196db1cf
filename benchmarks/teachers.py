"""Which families of teachers work: the page ``docs/teachers.md``.

    python -m benchmarks.teachers
    python -m benchmarks.teachers gpt2 llama

The first tries every family and writes the page (three minutes); named ones are only printed.
"""

import sys
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
whether a family's structure is understood. {works} of {all} families work, {refused} are refused,
{failing} fail in their own code, and {untried} cannot be built small by our rules.

A family that is not here works if its blocks are the outermost `ModuleList` as long as
`config.num_hidden_layers`, hold attention heads, and are followed by at most a norm and a head. The
columns are the largest differences, as a share of the largest value: of logits computed from the
last block's kept state on, of a block that runs alone on kept states, and of the states of windows
padded on the left or right.

"""


def main(argv: list[str] | None = None) -> None:
    """Try families, and write the page if all were tried.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
    """
    parser = CommandParser(prog="python -m benchmarks.teachers", description=__doc__)
    parser.add_argument("families", nargs="*", help="model types (default: all, and the page)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)

    from transformers.utils import logging as transformers_logging

    from benchmarks.families import FAMILIES, try_family

    findings = []
    transformers_logging.disable_progress_bar()
    for family in arguments.families or FAMILIES:
        finding = try_family(family)
        findings.append(finding)
        print(row(finding), flush=True)
    if not arguments.families:
        PAGE.write_text(page(findings), encoding="utf-8")
        print(f"written: {PAGE}")


def page(findings: "list[Finding]") -> str:
    """The whole page, by verdict."""
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
        numbers = "logits | a block alone | padding | " if verdict == "works" else ""
        head = f"| family | {numbers}remark |"
        text += f"## {verdict.capitalize()}\n\n{head}\n|{'---|' * (head.count('|') - 1)}\n"
        text += "".join(row(finding) + "\n" for finding in findings if finding.verdict == verdict)
        text += "\n"
    return text.rstrip() + "\n"


def row(finding: "Finding") -> str:
    """One line of a table."""
    numbers = [finding.logits, finding.advance, finding.padding]
    cells = [finding.family, *(f"{n:.0e}" for n in numbers if n is not None)]
    return f"| {' | '.join(cells)} | {finding.remark.replace('|', '/')} |"


if __name__ == "__main__":
    sys.exit(run_command(main))
