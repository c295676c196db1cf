"""Every speed figure of the project, in one command.

    python -m benchmarks.speed
    python -m benchmarks.speed --quick --only backbone,head

writes a JSON file and, beside it, the same tables in Markdown.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cleangpt.cli import CommandParser, run_command
from cleangpt.errors import UsageError

if TYPE_CHECKING:
    from benchmarks.cases import Shape
    from benchmarks.real_teacher import RealCase
    from benchmarks.report import Section

SECTIONS = (
    "backbone",
    "head",
    "end_to_end",
    "depth",
    "tokens",
    "blocks",
    "widths",
    "roofline",
    "memory",
    "smollm2",
    "decoding",
)


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--quick", action="store_true", help="small shapes: a try of the command")
    parser.add_argument(
        "--full", action="store_true", help="run the whole naive backbone instead of a part of it"
    )
    parser.add_argument("--device", default="cpu", help="where all but smollm2 is measured")
    parser.add_argument("--output", default="benchmarks/results/speed.json", help="the JSON file")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure what the flags ask for, and write and print the tables.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Raises:
        UsageError: If ``--only`` names no section.
    """
    arguments = build_parser().parse_args(argv)
    names = chosen_sections(arguments.only)

    from transformers.utils import logging as transformers_logging

    from benchmarks.report import machine, write_report
    from cleangpt.runtime.device import resolve_device

    transformers_logging.disable_progress_bar()
    about = machine()
    if about["load_average_at_start"] > about["cores"] / 2:
        print("Other work is running on this machine: figures will be noisy.", file=sys.stderr)
    shape, real, repeats = sizes(arguments.quick)
    shape = replace(shape, device=str(resolve_device(arguments.device)))
    measures = section_measures(shape, real, repeats, full=arguments.full)
    sections: dict[str, Section] = {}
    for name in names:
        started_at = time.perf_counter()
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        section = measures[name]()
        section.seconds = time.perf_counter() - started_at
        print(f"{section.seconds:.0f} s", file=sys.stderr, flush=True)
        print(section.markdown() + "\n", flush=True)
        sections[name] = section
    path = Path(arguments.output)
    markdown = write_report(sections, path, about, command_line(arguments))
    print(f"written: {path} and {markdown}")


def chosen_sections(only: str) -> list[str]:
    """The sections that ``--only`` names, in the order of the report.

    Raises:
        UsageError: If a name is unknown.
    """
    wanted = [name.strip() for name in only.split(",")]
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown:
        raise UsageError(
            f"Unknown section {', '.join(unknown)}.", f"--only takes {', '.join(SECTIONS)}."
        )
    return [name for name in SECTIONS if name in wanted]


def sizes(quick: bool) -> "tuple[Shape, RealCase, int]":
    """The random models' shape, the real teacher's run, and how often the short ones repeat."""
    from benchmarks.cases import Shape
    from benchmarks.real_teacher import RealCase

    if not quick:
        return Shape(), RealCase(), 3
    shape = Shape(blocks=3, vocab=4096, batch_size=4, seq_len=64, batches=2, epochs=2)
    return shape, RealCase(teacher="builtin", blocks=2, width=64), 1


def section_measures(
    shape: "Shape", real: "RealCase", repeats: int, *, full: bool
) -> "dict[str, Callable[[], Section]]":
    """What measures each section, at the sizes given."""
    from benchmarks import against_naive, decoding, growth, memory, roofline
    from benchmarks.cases import KINDS

    kind, fewer = KINDS[0], replace(shape, batches=2)
    # What a block costs once, whatever its data, would rule over three batches.
    more = replace(shape, batches=2 * shape.batches)
    return {
        "backbone": lambda: against_naive.measure_backbone(KINDS, more, full=full),
        "head": lambda: against_naive.measure_head(kind, shape),
        "end_to_end": lambda: against_naive.measure_end_to_end(kind, fewer),
        "depth": lambda: growth.measure_depth(kind, fewer, repeats),
        "tokens": lambda: growth.measure_tokens(kind, shape),
        "blocks": lambda: growth.measure_blocks(kind, fewer, min(2, repeats)),
        "widths": lambda: growth.measure_widths(kind, shape),
        "roofline": lambda: roofline.measure_roofline(kind, shape),
        "memory": lambda: memory.measure_memory(kind, shape, repeats > 1),
        "smollm2": lambda: smollm2_or_why_not(kind, real, min(2, repeats)),
        "decoding": lambda: decoding.measure_decoding(KINDS, shape, repeats),
    }


def smollm2_or_why_not(kind: str, case: "RealCase", repeats: int) -> "Section":
    """The section of the real teacher; where it is not installed, a table that says so."""
    from benchmarks.real_teacher import measure_real_teacher
    from benchmarks.report import Section
    from cleangpt.errors import EnvironmentProblem

    try:
        return measure_real_teacher(kind, case, repeats)
    except EnvironmentProblem as problem:
        return Section("A real teacher", ["not measured"], [[f"{problem.cause} {problem.remedy}"]])


def command_line(arguments: argparse.Namespace) -> str:
    """The command that takes the same figures again."""
    flags = [f"--{name}" for name in ("quick", "full") if getattr(arguments, name)]
    if arguments.device != "cpu":
        flags.append(f"--device {arguments.device}")
    if arguments.only != ",".join(SECTIONS):
        flags.append(f"--only {arguments.only}")
    return " ".join(["python -m benchmarks.speed", *flags])


if __name__ == "__main__":
    sys.exit(run_command(main))
