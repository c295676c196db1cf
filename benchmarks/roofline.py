"""How much of the machine's matmul rate a block step reaches, and where its time goes."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Shape, new_student, new_teacher, starting_stitches
from benchmarks.ours import PRECISIONS
from benchmarks.products import bare_seconds
from benchmarks.report import Section
from benchmarks.spread import ratios, spread
from benchmarks.steady import block_steps

MEASURED = 1
GROUPS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "matmul"),
    "attention": ("attention", "softmax"),
    "optimizer": ("adam", "foreach", "clip", "lerp", "addcdiv", "addcmul"),
    "norms, activation, loss": ("layer_norm", "gelu", "mse", "norm"),
    "copies and casts": ("copy", "cat", "stack", "clone", "fill", "zero", "index", "contiguous"),
}
"""What an operator's name contains, in this order; the rest is "other operators"."""


def measure_roofline(kind: str, shape: Shape) -> Section:
    """Achieved FLOP/s of a block step over those of its bare products, and the step's profile."""
    section = Section(
        f"Roofline of a block step ({shape.teacher_width} to {shape.student_width},"
        f" {shape.batch_size}x{shape.seq_len}, {kind})",
        ["precision", "ms per step", "GFLOP", "GFLOP/s", "torch.mm GFLOP/s", "share reached"],
    )
    small = replace(shape, blocks=2, epochs=shape.epochs + 2)
    teacher, start = new_teacher(small), new_student(kind, small)
    stitch = starting_stitches(teacher, start)[MEASURED]
    modules = [start.blocks[MEASURED], stitch]
    flops = matmul_flops(modules, small)
    for precision in PRECISIONS:
        bare: list[float] = []
        dtype = torch.float32 if precision == "fp32" else fastest_dtype(modules, small)

        def run_bare(epoch: int, dtype: Any = dtype, bare: list[float] = bare) -> None:
            bare.append(products_seconds(modules, small, dtype))

        (steps,) = block_steps(
            teacher, start, small, only=MEASURED, between=run_bare, precision=precision
        )
        rates = [flops / seconds / 1e9 for seconds in steps.steady]
        peak = [linear_flops(modules, small) / seconds / 1e9 for seconds in bare[1:]]
        section.add(
            f"{precision} ({str(dtype).removeprefix('torch.')})",
            spread(1e3 * seconds for seconds in steps.steady),
            flops / 1e9,
            spread(rates),
            spread(peak),
            ratios(rates, peak),
        )
        section.notes.append(f"{precision}: {profile_steps(teacher, start, small, precision)}")
    section.notes.append(
        "GFLOP: forward and backward products of every linear map of block and stitch, and"
        " attention as whole squares. torch.mm: the same products of the linear maps, bare, on"
        " resident operands of the precision's type, timed after each epoch."
    )
    return section


def linear_maps(modules: Sequence[nn.Module]) -> list[nn.Linear]:
    """Every linear map in a block or stitch."""
    return [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]


def linear_flops(modules: Sequence[nn.Module], shape: Shape) -> float:
    """Training FLOPs of the linear maps: 2 per weight and token, times three for the backward."""
    weights = sum(linear.weight.numel() for linear in linear_maps(modules))
    return 6.0 * weights * shape.tokens_per_batch


def matmul_flops(modules: Sequence[nn.Module], shape: Shape) -> float:
    """:func:`linear_flops`, and attention's two products over all pairs of positions."""
    pairs = 12.0 * shape.tokens_per_batch * shape.seq_len * shape.student_width
    return linear_flops(modules, shape) + pairs


def products_seconds(modules: Sequence[nn.Module], shape: Shape, dtype: torch.dtype) -> float:
    """The median time of all bare products of one step: output, and both gradients."""
    work = []
    tokens, device = shape.tokens_per_batch, torch.device(shape.device)
    for linear in linear_maps(modules):
        weight = linear.weight.detach().to(dtype)
        inputs = torch.randn(tokens, weight.shape[1], device=device).to(dtype)
        outputs = torch.randn(tokens, weight.shape[0], device=device).to(dtype)
        work += [(inputs, weight.t()), (outputs, weight), (outputs.t(), inputs)]
    return bare_seconds(work)


def fastest_dtype(modules: Sequence[nn.Module], shape: Shape) -> torch.dtype:
    """The type whose bare products are fastest here: what the default is held against."""
    dtypes = (torch.float32, torch.bfloat16)
    return min(dtypes, key=lambda dtype: products_seconds(modules, shape, dtype))


def profile_steps(teacher: Any, start: Any, shape: Shape, precision: str) -> str:
    """Say which operators the time of the steady steps goes to."""
    profiler = profile(activities=[ProfilerActivity.CPU])
    began: list[float] = []
    ended: list[float] = []

    def between(epoch: int) -> None:
        if epoch == 0:
            profiler.start()
            began.append(time.perf_counter())
        elif epoch == shape.epochs - 1:
            ended.append(time.perf_counter())
            profiler.stop()

    block_steps(teacher, start, shape, only=MEASURED, between=between, precision=precision)
    whole = (ended[0] - began[0]) * 1e6
    operators = {
        event.key.removeprefix("aten::"): event.self_cpu_time_total
        for event in profiler.key_averages()
        if event.key.startswith("aten::")
    }
    groups: dict[str, float] = {}
    for name, microseconds in operators.items():
        group = group_of(name)
        groups[group] = groups.get(group, 0.0) + microseconds
    groups["Python and autograd between operators"] = whole - sum(operators.values())
    top = sorted(operators.items(), key=lambda item: -item[1])[:8]
    return f"{shares(groups, whole)}. Largest operators: {shares(dict(top), whole)}."


def group_of(operator: str) -> str:
    """The group of an operator by its name."""
    for group, words in GROUPS.items():
        if any(word in operator for word in words):
            return group
    return "other operators"


def shares(parts: dict[str, float], whole: float) -> str:
    """Each part's share of the whole, the largest first."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value / whole:.0%}" for name, value in ordered)
