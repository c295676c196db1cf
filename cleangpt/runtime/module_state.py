"""What a stage changes about modules besides their weights, and how it is put back."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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


def tensors_fingerprint(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and bytes: equal exactly when every tensor is, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()
