"""Weights that do not all lie on the training device, or in one process.

A block's weights may be in host memory or in a file (accelerate's device map), or spread over the
processes of a run (FSDP2). Modules fetch them by themselves when they run; what reads weights
without running a module asks here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_placed(model: nn.Module) -> bool:
    """Whether parts of the model have a place of their own, where ``to`` must leave them."""
    return any(hasattr(part, "_hf_hook") or _is_spread(part) for part in model.modules())


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move a model, unless its parts have places of their own."""
    if not is_placed(model):
        model.to(device)


def whole_tensor(owner: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of ``owner.state_dict()`` with its numbers, wherever they lie.

    All processes of a run must ask for a spread tensor together.
    """
    if hasattr(tensor, "full_tensor"):
        whole: Tensor = tensor.full_tensor()
        return whole
    if tensor.is_meta:
        from transformers.integrations.accelerate import load_offloaded_parameter

        fetched: Any = load_offloaded_parameter(owner, name)
        return fetched.to(tensor.dtype)
    return tensor


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Have all weights of a module at hand inside the block, on the device it runs on.

    All processes of a run must enter together if they share the module.
    """
    hooked: list[Any] = [part for part in module.modules() if hasattr(part, "_hf_hook")]
    forwards = [part.forward for part in hooked]
    for part in hooked:
        part._hf_hook.pre_forward(part)
        part.forward = part._old_forward  # the other one drops the weights when it has run
    spread: Any = module if _is_spread(module) else None
    if spread is not None:
        spread.unshard()
    try:
        yield
    finally:
        if spread is not None:
            spread.reshard()
        for part, forward in zip(hooked, forwards, strict=True):
            part.forward = forward
            part._hf_hook.post_forward(part, None)


def _is_spread(module: nn.Module) -> bool:
    """Whether FSDP2 has spread it; asked without importing that, which takes a while."""
    return hasattr(module, "unshard")
