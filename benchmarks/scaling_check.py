"""The plan for many devices against real runs at small scale: memory, disk, traffic and time.

This machine takes the place of a cluster: one thread is a device. What a cluster's efficiency is
assumed to be is part of the rates here, which are measured while each run goes on
(``benchmarks.rates``).
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.cases import Shape, new_student, new_teacher
from benchmarks.rates import Rates
from benchmarks.report import Section
from benchmarks.scaling import measured
from benchmarks.scaling_worker import Counts
from cleangpt.blocks import BlockStack
from cleangpt.runtime.memory import free_memory
from distillation.accelerators import Accelerator, Cluster
from distillation.layer_map import uniform_layer_map
from distillation.scale_plan import ScalePlan, plan_at_scale
from distillation.scale_sizes import Setup
from distillation.workload import Workload

TOLERANCE = 0.2


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        name: What is said of it.
        shape: Sizes.
        processes: How many share it.
        shards: Whether they spread the teacher.
        polish_epochs: Epochs of the whole student, at the end.
        options: Settings of the trainer.
    """

    name: str
    shape: Shape
    processes: int = 1
    shards: bool = False
    polish_epochs: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def measure_check(shape: Shape, repeats: int) -> Section:
    """Predict some runs, run them, and compare.

    Args:
        shape: Sizes of the first run.
        repeats: Of each run; the shortest counts.
    """
    section = Section(
        f"The plan against real runs (one thread per process; the shortest of {repeats}; the first"
        f" is of {shape})",
        ["run", "quantity", "predicted", "measured", "predicted / measured", "within 20 %"],
    )
    said: list[str] = []
    for case, found in shortest_runs(cases(shape), repeats):
        assert found.rates is not None
        said.append(in_words(case, found.rates))
        add_rows(section, case, planned(case, as_cluster(case, found.rates)), found)
    section.notes += [
        "Rates of process 0, the medians of tries before the run, after each of its stages and at"
        " its end, all processes at the same time: operations in blocks of the run's shape, memory,"
        " sums of a block's gradients; and gathering a block, at both ends."
        f" {'; '.join(said)}.",
        "Memory: of process 0, above its level before there are models. Traffic: bytes handed to"
        " the sums over processes, and whole blocks gathered, counted where they are sent.",
    ]
    return section


def shortest_runs(all_cases: list[Case], repeats: int) -> list[tuple[Case, Counts]]:
    """Each case with the shortest of its runs: other work on the machine only adds.

    They take turns, so that a slow minute of the machine is not all that one case has seen.
    """
    runs: list[list[Counts]] = [[] for _ in all_cases]
    for _ in range(repeats):
        for case, own in zip(all_cases, runs, strict=True):
            how = {"shards": case.shards, "options": case.options}
            how["polish_epochs"] = case.polish_epochs
            own.append(measured(case.shape, case.processes, **how))
            print(f"{case.name}: {own[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    return [
        (case, min(own, key=lambda run: run.seconds))
        for case, own in zip(all_cases, runs, strict=True)
    ]


def cases(shape: Shape) -> list[Case]:
    """The runs: of several shapes, schedules and numbers of processes."""
    other = replace(shape, blocks=shape.blocks + 2, batch_size=shape.batch_size // 2, epochs=2)
    # Another width, vocabulary and length of the windows.
    wide = replace(
        shape,
        teacher_width=3 * shape.teacher_width // 2,
        student_width=3 * shape.student_width // 2,
        vocab=2 * shape.vocab,
        batch_size=shape.batch_size // 2,
        seq_len=2 * shape.seq_len,
    )
    disk = {"activation_cache": "disk"}
    taught = {"polish_hidden_weight": 1.0, "audit_tokens": shape.batches * shape.tokens_per_batch}
    return [
        Case("one process", shape),
        Case("one, deeper, smaller batches", other),
        Case("one, blocks together", shape, options={"schedule": "parallel_local"}),
        Case("one, states on disk", shape, options=disk),
        Case("one, wider, longer, more words", wide),
        Case("one, audited and polished", shape, polish_epochs=2, options=taught),
        Case("two processes", shape, processes=2),
        Case("two, deeper, spread teacher", other, processes=2, shards=True),
        Case("two, spread, no cache", shape, 2, shards=True, options={"activation_cache": "off"}),
        Case("two, wider, spread, polished", wide, 2, shards=True, polish_epochs=1, options=taught),
    ]


def as_cluster(case: Case, rates: Rates) -> Cluster:
    """Each process of a run as a device with these rates."""
    kind = Accelerator(
        name="thread",
        memory_bytes=float(free_memory(torch.device("cpu"))),
        flops=rates.flops,
        memory_rate=rates.memory,
        link_rate=rates.summed or 1.0,
        network_rate=1.0,
        disk_rate=1e10,  # a small file stays in the page cache
    )
    gather_share = rates.gathered / rates.summed if rates.gathered else 1.0
    return Cluster(kind, case.processes, 1.0, 1.0, gather_share)


def in_words(case: Case, rates: Rates) -> str:
    """The rates of a run."""
    words = [f"{rates.flops / 1e9:.1f} GFLOP/s", f"{rates.memory / 1e9:.1f} GB/s"]
    words += [f"{rate / 1e9:.2f} GB/s" for rate in (rates.summed, rates.gathered) if rate]
    return f"{case.name}: {', '.join(words)}"


def planned(case: Case, cluster: Cluster) -> ScalePlan:
    """What the plan says of a run on these devices."""
    shape = case.shape
    outline = replace(shape, device="meta")
    with torch.device("meta"):
        teacher = BlockStack(new_teacher(outline))
        student = BlockStack(new_student("Vanilla", outline))
    work = Workload(
        positions=shape.batches * shape.tokens_per_batch,
        batches=float(shape.batches),
        batch_size=shape.batch_size,
        seq_len=shape.seq_len,
        epochs_per_block=[shape.epochs] * shape.blocks,
        head_epochs=1,
        polish_epochs=case.polish_epochs,
        layer_map=uniform_layer_map(shape.blocks, shape.blocks),
        schedule=case.options.get("schedule", "sequential"),
        polish_reads_levels=case.options.get("polish_hidden_weight", 0.0) > 0,
    )
    setup = Setup(
        kept_widths=[shape.teacher_width, shape.student_width],
        shards_teacher=case.shards,
        cache=case.options.get("activation_cache", "auto"),
        audit_tokens=case.options.get("audit_tokens", 0),
        read_out_fits=int(case.polish_epochs > 0),
    )
    return plan_at_scale(teacher, student, work, cluster, setup)


def add_rows(section: Section, case: Case, plan: ScalePlan, found: Counts) -> None:
    """A line per quantity that a run has."""
    steps = sum(stage.steps * stage.reduced_bytes for stage in plan.stages)
    on_disk = plan.cache.kind == "disk"
    states = plan.disk_bytes if on_disk else max(s.memory.states for s in plan.stages)
    rows = [
        ("gradients and moments, MB", max(s.memory.training for s in plan.stages),
         max(found.training), 1e6),
        ("kept states, MB", states, found.states, 1e6),
        ("states on disk, MB", plan.disk_bytes, found.disk, 1e6),
        ("peak memory, MB", plan.peak.memory.total, found.peak, 1e6),
        ("summed over processes, MB", steps if case.processes > 1 else 0, found.reduced, 1e6),
        ("blocks gathered, MB", plan.gathers * plan.block_bytes, found.gathered, 1e6),
        ("sums of the audit, MB", plan.audit_bytes, found.audit, 1e6),
        ("sums of the stitches' fit, MB", plan.fit_bytes, found.fit, 1e6),
        ("time, s", plan.seconds, found.seconds, 1.0),
    ]  # fmt: skip
    for quantity, predicted, value, unit in rows:
        if not value and not predicted:
            continue
        ratio = predicted / value if value else float("inf")
        holds = "yes" if abs(ratio - 1) <= TOLERANCE else "no"
        section.add(case.name, quantity, predicted / unit, value / unit, ratio, holds)
