"""Devices and random seeds."""

import torch

from cleangpt.errors import UsageError


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device called ``name`` ("cpu", "cuda", "cuda:1", "mps") if this machine has it.

    Raises:
        UsageError: If the machine has no such device.
    """
    device = torch.device(name)
    if device.type not in available_device_types():
        raise UsageError(
            f"The device {str(name)!r} was asked for, and this machine offers:"
            f" {', '.join(available_device_types())}.",
            f"Pass --device {available_device_types()[0]}, or install PyTorch for {device.type}.",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"The device {str(name)!r} was asked for, and this machine has"
            f" {torch.cuda.device_count()} GPUs.",
            f"Choose cuda:0 to cuda:{torch.cuda.device_count() - 1}.",
        )
    return device


def available_device_types() -> list[str]:
    """The device types PyTorch can use here, the fastest first."""
    types = ["cpu"]
    if torch.backends.mps.is_available():
        types.insert(0, "mps")
    if torch.cuda.is_available():
        types.insert(0, "cuda")
    return types


def default_device() -> torch.device:
    """The fastest device of this machine."""
    return torch.device(available_device_types()[0])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that work on ``device`` draws from.

    Cheap enough for every step: ``torch.manual_seed`` also formats a stack trace for each kind of
    accelerator that is not in use, about a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
