"""``torch.compile`` for the modules in training, and nothing left of it afterwards."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def compiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Compile the modules' forward passes for as long as the block runs.

    Only ``forward`` is replaced, so hooks stay outside of the compiled part. The first steps take
    seconds longer, and results differ by rounding.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            replaced.append((module, module.__dict__.get("forward")))
            module.forward = torch.compile(module.forward)
        yield
    finally:
        for module, own in replaced:
            del module.forward
            if own is not None:
                module.forward = own
