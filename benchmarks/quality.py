"""How good the students are: the study behind ``docs/results.md``.

    python -m benchmarks.quality arms
    python -m benchmarks.quality arms --seeds 0 --budgets small --arms A1,A5 --split validation
    python -m benchmarks.quality report

runs what a table needs and is not yet in its file, one line of JSON per run; a stopped study goes
on where it was. ``report`` turns all files into the page and its figures. The plan (arms, budgets,
seeds, endpoint) is in ``quality_plan.py`` and was committed before the runs.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cleangpt.cli import CommandParser, run_command

if TYPE_CHECKING:
    from benchmarks.quality_plan import Run

RESULTS = Path("benchmarks/results/quality")
REPORT = "report"


def build_parser() -> CommandParser:
    """The command's flags."""
    from benchmarks.quality_plan import BUDGETS
    from benchmarks.quality_tables import TABLES

    parser = CommandParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("table", choices=(*TABLES, REPORT), help="what to run, or the page")
    parser.add_argument("--seeds", help="only these, as 0,1,2 (default: the plan's)")
    parser.add_argument("--budgets", help=f"only these of {', '.join(BUDGETS)}")
    parser.add_argument("--arms", help="only these arms")
    parser.add_argument("--kinds", help="only these kinds of student")
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="what students are judged on; settings are tuned on validation (default: test)",
    )
    parser.add_argument(
        "--other_text", help="a second text that students of a real teacher are judged on"
    )
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run from i, to share out")
    parser.add_argument("--threads", type=int, default=0, help="threads per run; 0 is PyTorch's")
    parser.add_argument("--output", help="the JSON-lines file (default: the table's)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run what is missing of a table, or write the page.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
    """
    arguments = build_parser().parse_args(argv)
    if arguments.table == REPORT:
        from benchmarks.quality_report import write_page

        print(f"written: {write_page(RESULTS, Path('docs'))}")
        return

    import torch
    from transformers.utils import logging as transformers_logging

    from benchmarks.quality_data import perform
    from benchmarks.quality_tables import TABLES

    transformers_logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = Path(arguments.output or RESULTS / f"{arguments.table}.jsonl")
    part, parts = (int(number) for number in arguments.part.split("/"))
    runs = [run for run in TABLES[arguments.table]() if is_wanted(run, arguments)][part::parts]
    done = {record["key"] for record in read_records(path)}
    missing = [run for run in runs if run.key not in done]
    print(f"{len(runs)} runs, {len(missing)} to do", flush=True)
    for index, run in enumerate(missing):
        started_at = time.perf_counter()
        record = {"key": run.key, "table": arguments.table, "split": arguments.split}
        other = Path(arguments.other_text) if arguments.other_text else None
        record |= {"threads": torch.get_num_threads(), **perform(run, arguments.split, other)}
        append_record(path, record)
        print(
            f"{index + 1}/{len(missing)} {run.key}: loss {record['loss']:.4f},"
            f" KL {record['kl']:.4f}, {time.perf_counter() - started_at:.0f} s",
            flush=True,
        )


def is_wanted(run: "Run", arguments: argparse.Namespace) -> bool:
    """Whether the filters let a run through."""
    filters = (
        (arguments.seeds, str(run.seed)),
        (arguments.budgets, run.budget),
        (arguments.arms, run.arm.name),
        (arguments.kinds, run.kind),
    )
    return all(wanted is None or value in wanted.split(",") for wanted, value in filters)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none if it is not there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add one line; several processes may write to one file in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
