"""The report of a run, a comparison of runs, or a view of one that goes on.

    python -m distillation.report RUN

writes one HTML page; ``--help`` is instant, as everything else is imported inside ``main``.
"""

import argparse
import logging
import sys
from pathlib import Path

from cleangpt.cli import CommandParser, positive_float, program_name, run_command, setup_logging

logger = logging.getLogger(__name__)

PROGRAM = "distillation.report"
GENERATOR = b'<meta name="generator" content="cleanGPT distillation">'
"""What stands in every page (templates/base.html): only such a file is written over."""


def main(argv: list[str] | None = None) -> None:
    """Write the page, or follow the run.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Raises:
        CleanGPTError: For anything the user can mend; ``run_command`` prints it in two lines.
    """
    arguments = build_parser().parse_args(argv)
    setup_logging(arguments.debug)
    _check(arguments)
    if arguments.watch is not None:
        from distillation.report.watch import watch

        watch(Path(arguments.watch), arguments.interval)
        return
    path = write_page([Path(name) for name in arguments.runs], arguments.output)
    print(f"report: {path}")


def build_parser() -> CommandParser:
    """All flags."""
    parser = CommandParser(
        prog=program_name(PROGRAM),
        description="One self-contained HTML page about a run, or about several side by side; or a"
        " live view of a run in the terminal.",
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="directory of a run; several are compared")
    add(
        "--output",
        metavar="FILE",
        help="the page (default: evaluation/report.html in the run, where an evaluation writes it"
        " too; comparison.html for several runs)",
    )
    add("--watch", metavar="RUN", help="follow a run that goes on, until it ends")
    add(
        "--interval",
        type=positive_float,
        default=2.0,
        help="seconds between two looks of --watch (default: 2)",
    )
    add("--debug", action="store_true", help="show tracebacks and debug messages")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    from cleangpt.errors import UsageError

    if (arguments.watch is None) == (not arguments.runs):
        raise UsageError(
            "name the directory of one run, of several to compare, or one to --watch.",
            "For example: python -m distillation.report runs/demo",
        )
    if arguments.watch is not None and arguments.output:
        raise UsageError(
            "--watch shows a run in the terminal and writes no --output.",
            "Leave one of them out.",
        )


def write_page(runs: list[Path], output: str | None = None) -> Path:
    """Write the page of one run, or of several side by side, and return where it is.

    Args:
        runs: Directories.
        output: The file; None takes the usual place.

    Raises:
        UsageError: If there is a file already that is no report.
    """
    from cleangpt.disk_errors import disk_errors_explained
    from cleangpt.errors import UsageError
    from cleangpt.run_directory import write_atomically

    if len(runs) == 1:
        from distillation.report.page import run_page

        page, usual = run_page(runs[0]), runs[0] / "evaluation" / "report.html"
    else:
        from distillation.report.comparison import comparison_page

        page, usual = comparison_page(runs), Path("comparison.html")
    path = Path(output) if output else usual
    content = page.encode()
    with disk_errors_explained(path):
        if path.exists() and GENERATOR not in path.read_bytes()[:1000]:
            raise UsageError(
                f"{path} is there and is no report.", "Name another file with --output, or move it."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, lambda place: place.write_bytes(content), len(content))


if __name__ == "__main__":
    sys.exit(run_command(main))
