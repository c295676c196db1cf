"""What a stage changes about modules besides their weights, and how it is put back."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from cleangpt.runtime.placement import whole_tensor


@contextmanager
def preserved_modes(*models: nn.Module) -> Iterator[None]:
    """Restore train/eval mode and ``requires_grad`` of every part, also after an exception."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for m in models for parameter in m.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def not_finite(tensors: Mapping[str, Tensor], owner: nn.Module | None = None) -> list[str]:
    """The names of the tensors that hold NaN or infinite numbers.

    Args:
        tensors: By name.
        owner: The module whose state they are of, where some of them may lie elsewhere.
    """
    found = []
    for name, tensor in tensors.items():
        whole = tensor if owner is None else whole_tensor(owner, name, tensor)
        if whole.is_floating_point() and not whole.isfinite().all():
            found.append(name)
    return found


def tensors_fingerprint(
    named_tensors: Iterable[tuple[str, Tensor]], owner: nn.Module | None = None
) -> str:
    """SHA-256 over names, shapes and bytes: equal exactly when every tensor is, bit for bit.

    Args:
        named_tensors: The tensors.
        owner: The module whose state they are of, where some of them may lie elsewhere.
    """
    return _digest(hashlib.sha256(), named_tensors, owner)


def tensors_checksum(
    named_tensors: Iterable[tuple[str, Tensor]], owner: nn.Module | None = None
) -> str:
    """The same with XXH3-128: ten times as fast, and safe against accidents only."""
    return _digest(xxhash.xxh3_128(), named_tensors, owner)


def _digest(
    digest: Any, named_tensors: Iterable[tuple[str, Tensor]], owner: nn.Module | None
) -> str:
    for name, tensor in sorted(named_tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        whole = tensor if owner is None else whole_tensor(owner, name, tensor)
        raw = whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy())
    return str(digest.hexdigest())
