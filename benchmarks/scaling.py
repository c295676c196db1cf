"""What a second process is worth, and whether the plan for many devices tells the truth.

    python -m benchmarks.scaling                 # one against two processes, weak and strong
    python -m benchmarks.scaling --check         # the plan's numbers against those of real runs

One process is one thread of the CPU; two talk through gloo. Writes JSON and Markdown as
``benchmarks.speed`` does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cleangpt.cli import CommandParser, positive_int, run_command

if TYPE_CHECKING:
    from benchmarks.cases import Shape
    from benchmarks.report import Section
    from benchmarks.scaling_worker import Counts

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the plan with real runs")
    parser.add_argument("--quick", action="store_true", help="small shapes: a try of the command")
    parser.add_argument("--repeats", type=positive_int, default=3, help="of each run (default: 3)")
    parser.add_argument("--output", help="the JSON file (default: benchmarks/results/scaling.json)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure, and write and print the tables.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
    """
    arguments = build_parser().parse_args(argv)

    from benchmarks.report import machine, write_report
    from benchmarks.scaling_check import measure_check

    about = {**machine(), "threads": 1}
    if about["load_average_at_start"] > about["cores"] / 2:
        print("Other work is running on this machine: figures will be noisy.", file=sys.stderr)
    shape = base_shape(quick=arguments.quick)
    started_at = time.perf_counter()
    name = "check" if arguments.check else "processes"
    how = measure_check if arguments.check else measure
    section = how(shape, arguments.repeats)
    section.seconds = time.perf_counter() - started_at
    print(section.markdown() + "\n", flush=True)
    path = Path(arguments.output or f"benchmarks/results/scaling-{name}.json")
    markdown = write_report({name: section}, path, about, command_line(arguments), "Scaling")
    print(f"written: {path} and {markdown}")


def base_shape(*, quick: bool) -> "Shape":
    """What one process computes in all measurements."""
    from benchmarks.cases import Shape

    if quick:
        return Shape(
            blocks=2,
            teacher_width=64,
            student_width=32,
            student_heads=2,
            vocab=256,
            batch_size=4,
            seq_len=32,
            batches=2,
            epochs=2,
        )
    return Shape(
        blocks=4, teacher_width=512, student_width=256, student_heads=4, vocab=8192, batches=4
    )


def measure(shape: "Shape", repeats: int) -> "Section":
    """One process against two: the same batch shared, and a batch of the same size for each."""
    from benchmarks.report import Section
    from benchmarks.spread import ratios, spread

    section = Section(
        f"A second process (one thread each, {shape}, {shape.steps} steps per block and"
        f" {shape.batches} of the head)",
        ["case", "rows per process", "seconds", "of one process's time", "ideal"],
    )
    double = replace(shape, batch_size=2 * shape.batch_size)
    cases = {
        "one process": (shape, 1),
        "one process, twice the rows": (double, 1),
        "two, the same batch (strong)": (shape, 2),
        "two, the same rows each (weak)": (double, 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (case, processes) in cases.items():
            seconds[name].append(measured(case, processes).seconds)
    one = seconds["one process"]
    for name, (case, processes) in cases.items():
        ideal = case.batch_size / shape.batch_size / processes
        rows = case.batch_size // processes
        section.add(name, rows, spread(seconds[name]), ratios(seconds[name], one), ideal)
    section.notes += [
        "Seconds of all stages, filling of the store and checks included. Strong: the time of one"
        " process divided by two is the ideal. Weak: the time of one process.",
        "Each process computes its rows; gradients are summed once per step, after the backward"
        " pass. What is not shared: the optimizer's step, which every process takes, and the checks"
        " by hash at both ends of a stage.",
    ]
    return section


def measured(shape: "Shape", processes: int, **task: Any) -> "Counts":
    """What a run in processes of their own counted."""
    from benchmarks.rates import Rates
    from benchmarks.scaling_worker import Counts

    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps({"shape": asdict(shape), "folder": folder, **task})
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(processes)]
        done = subprocess.run(
            [*command, "-m", "benchmarks.scaling_worker", text],
            cwd=ROOT,
            # What is freed goes back to the system, so that memory in use can be read.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"the worker failed: {done.stderr.strip()[-8000:]}")
    counts = json.loads(done.stdout.splitlines()[-1])
    return Counts(**{**counts, "rates": Rates(**counts["rates"])})


def command_line(arguments: argparse.Namespace) -> str:
    """The command that takes the same figures again."""
    flags = [f"--{name}" for name in ("check", "quick") if getattr(arguments, name)]
    return " ".join(["python -m benchmarks.scaling", *flags])


if __name__ == "__main__":
    sys.exit(run_command(main))
