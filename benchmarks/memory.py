"""Peak memory of each phase, each measured in a process of its own.

    python -m benchmarks.memory ours-head --precision fp32

runs one phase and prints its megabytes as JSON; :func:`measure_memory` starts one such process per
phase, so that no phase sees what another left behind.
"""

import argparse
import contextlib
import gc
import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.cases import Shape, new_student, new_teacher, starting_stitches, windows_loader
from benchmarks.ours import where
from benchmarks.report import Section
from cleangpt.cli import CommandParser, run_command

MIB = 2**20
PHASES = ("naive-first", "naive-later", "naive-head", "ours-first", "ours-later", "ours-head")
LR = 1e-3


def measure_memory(kind: str, shape: Shape, thorough: bool = True) -> Section:
    """The peak of each phase, in total and above the two models.

    Args:
        kind: The student's kind.
        shape: Sizes.
        thorough: Whether the default precision and a doubled batch are measured too.
    """
    section = Section(
        f"Peak memory ({shape}, {kind})",
        ["phase", "batch", "peak MiB", "above the models MiB", "naive / ours, above"],
    )
    small = replace(shape, batches=2)
    double = replace(small, batch_size=2 * small.batch_size)
    cases = []
    for phase in ("first", "later", "head"):
        cases += [(f"naive-{phase}", "fp32", small), (f"ours-{phase}", "fp32", small)]
        cases += [(f"ours-{phase}", "auto", small)] if thorough else []
    if thorough:
        cases += [("naive-head", "fp32", double), ("ours-head", "fp32", double)]
    above: dict[tuple[str, int], float] = {}
    for phase, precision, case in cases:
        found = measure_apart(phase, precision, kind, case)
        who, what = phase.split("-", 1)
        own = found["peak"] - found["models"]
        if who == "naive":
            above[(what, case.batch_size)] = own
        naive = above.get((what, case.batch_size))
        section.add(
            f"{phase}, {precision}",
            f"{case.batch_size}x{case.seq_len}",
            found["peak"],
            own,
            naive / own if naive and who == "ours" else "",
        )
    section.notes += [
        "Each phase ran in its own process; the level of the loaded models (with Python and"
        " PyTorch) is taken off in the fourth column. First: block 0, which trains the"
        " embeddings too, so that both loops hold their gradient and the optimizer's two states;"
        " later: for the naive loop block 1, for ours all blocks after block 0. Ours is a whole"
        " phase, filling included; naive: two steps.",
        f"Ours holds {small.batches * small.batch_size} windows in its store here:"
        f" {store_bytes(small) / MIB:.0f} MiB of the figure. With more data the store grows by"
        f" {store_bytes(small) // (small.batches * small.tokens_per_batch)} bytes a token (float32,"
        " Vanilla) up to its budget, which is free memory.",
    ]
    return section


def store_bytes(shape: Shape) -> int:
    """What one level of teacher and student takes for all windows, in float32."""
    return 4 * shape.batches * shape.tokens_per_batch * (shape.teacher_width + shape.student_width)


def measure_apart(phase: str, precision: str, kind: str, shape: Shape) -> dict[str, float]:
    """Run one phase in a fresh process; return its mebibytes."""
    command = [sys.executable, "-m", "benchmarks.memory", phase, "--precision", precision]
    command += ["--kind", kind, "--shape", json.dumps(asdict(shape))]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{phase} failed: {done.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_phase(phase: str, precision: str, kind: str, shape: Shape) -> dict[str, float]:
    """Run one phase here; return the level of the models and the peak, in mebibytes."""
    teacher, student = new_teacher(shape), new_student(kind, shape)
    gc.collect()
    models = psutil.Process().memory_info().rss / MIB
    work = our_phase if phase.startswith("ours") else naive_phase
    if shape.device != "cpu":
        models = torch.cuda.memory_allocated() / MIB
        torch.cuda.reset_peak_memory_stats()
    forget_peak()
    work(phase, precision, teacher, student, shape)
    return {"models": models, "peak": peak_mib(shape.device)}


def forget_peak() -> None:
    """Start the kernel's high-water mark anew where it can be: making the models has peaks too."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def naive_phase(phase: str, precision: str, teacher: Any, student: Any, shape: Shape) -> None:
    """Two steps of a naive loop."""
    from benchmarks.naive import naive_block, naive_head
    from distillation.config import StageSettings

    loader, settings = windows_loader(shape), StageSettings(epochs=1, lr=LR)
    if phase == "naive-head":
        loop = naive_head(teacher, student, loader, settings)
    else:
        block = 1 if phase == "naive-later" else 0
        stitch: Any = starting_stitches(teacher, student)[block]
        loop = naive_block(teacher, student, stitch, block, loader, settings)
    loop.epoch(max_steps=2)


def our_phase(phase: str, precision: str, teacher: Any, student: Any, shape: Shape) -> None:
    """Block 0, or all blocks after it, one epoch each; or the head phase, two."""
    import tempfile

    from distillation.trainers import BackboneDistillationTrainer, HeadDistillationTrainer

    trainer_class: Any = BackboneDistillationTrainer
    if phase == "ours-head":
        trainer_class = HeadDistillationTrainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            teacher,
            student,
            None,
            windows_loader(shape),
            **where(student, folder),
            precision=precision,
        )
        if phase == "ours-head":
            trainer.train_head(2, LR, initialize_from_teacher=False)
        else:
            later = int(phase == "ours-later")
            trainer.train_backbone([1 - later] + [later] * (shape.blocks - 1), LR)


def peak_mib(device: str) -> float:
    """The largest resident size this process ever had, or what it allocated on an accelerator."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a process starts with the mark of the one that started it.
        lines = status.read_text(encoding="ascii").splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def main(argv: list[str] | None = None) -> None:
    """Run one phase and print what it took.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
    """
    parser = CommandParser(prog="python -m benchmarks.memory", description="One phase's memory.")
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--precision", default="fp32", help="of ours; the naive loop is float32")
    parser.add_argument("--kind", default="Vanilla", help="kind of student")
    parser.add_argument("--shape", type=json.loads, default={}, help="fields of Shape, as JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments: argparse.Namespace = parser.parse_args(argv)
    shape = replace(Shape(), **arguments.shape)
    print(json.dumps(run_phase(arguments.phase, arguments.precision, arguments.kind, shape)))


if __name__ == "__main__":
    sys.exit(run_command(main))
