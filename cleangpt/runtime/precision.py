"""In which precision matrix products run: asked for, or decided by a short measurement.

Parameters, optimizer states, norms, softmax and losses are float32 in either case; "bf16" is
PyTorch's autocast.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from cleangpt.errors import UsageError

PRECISIONS = ("auto", "fp32", "bf16")

_MIN_WIDTH = 256
"""Narrower models spend their time in elementwise operations, to which autocast adds casts."""
_MIN_SPEED_UP = 1.3
_ROWS = 512
_REPEATS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """A decision and its reason.

    Args:
        name: "fp32" or "bf16".
        reason: Why, for the log.
    """

    name: str
    reason: str

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which a model's forward pass runs.

        Casts are not cached: a weight first cast without a graph would be reused in training.
        """
        return torch.autocast(
            device.type,
            dtype=torch.bfloat16,
            enabled=self.name == "bf16",
            cache_enabled=False,
        )

    @contextmanager
    def tensor_cores(self, device: torch.device) -> Iterator[None]:
        """Let what stays float32 on a GPU use TF32 inside the block, unless exactness was asked."""
        before = torch.get_float32_matmul_precision()
        if self.name == "bf16" and device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def choose_precision(asked: str, device: torch.device, width: int) -> Precision:
    """Decide the precision of a run.

    Args:
        asked: "fp32", "bf16" or "auto".
        device: Where the run trains.
        width: Width of the student's blocks.

    Raises:
        UsageError: If ``asked`` is unknown, or is "bf16" and the device has none.
    """
    if asked not in PRECISIONS:
        raise UsageError(
            f"precision is {asked!r}; it is one of {', '.join(PRECISIONS)}.",
            "Pass --precision auto to let a short measurement decide.",
        )
    if asked == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError(
            f"precision is 'bf16', and {torch.cuda.get_device_name(device)} has no bf16.",
            "Pass --precision fp32 or --precision auto.",
        )
    if asked != "auto":
        return Precision(asked, "as asked")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision("bf16" if fast else "fp32", "the GPU has bf16" if fast else "no bf16")
    if device.type != "cpu":
        return Precision("fp32", f"bf16 is not tried on {device.type}")
    if width < _MIN_WIDTH:
        return Precision("fp32", f"at width {width} bf16 saves less than its casts cost")
    speed_up = bf16_speed_up(width)
    name = "bf16" if speed_up >= _MIN_SPEED_UP else "fp32"
    return Precision(name, f"bf16 matrix products measured {speed_up:.2g} times as fast")


@cache
def bf16_speed_up(width: int) -> float:
    """How many times as fast as float32 the CPU multiplies in bf16, at an MLP's shape.

    The best of a few interleaved repeats, some milliseconds in all; remembered, so that one
    process never decides twice differently.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    generator = torch.Generator().manual_seed(0)  # the run's own generators stay untouched
    states = torch.randn(_ROWS, width, generator=generator)
    weight = torch.randn(4 * width, width, generator=generator)
    for _ in range(_REPEATS):
        for dtype in best:
            left, right = states.to(dtype), weight.to(dtype).T
            started_at = time.perf_counter()
            torch.mm(left, right)
            best[dtype] = min(best[dtype], time.perf_counter() - started_at)
    return best[torch.float32] / best[torch.bfloat16]
