"""One student in one ``.pt`` file: a dict of tensors and one JSON string, nothing else.

Loading never runs code from a file: only PyTorch's restricted loader is used, and the file holds
nothing that needs more. Weights load strictly; a missing, unexpected or mis-shaped tensor is an
error.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cleangpt.errors import CheckpointError, InputError
from cleangpt.metrics_log import without_nonfinite
from cleangpt.run_directory import disk_errors_explained, write_atomically

FORMAT_VERSION = 1


def save_checkpoint(model: nn.Module, path: str | Path, **extra: Any) -> Path:
    """Write the model's weights and configuration, atomically.

    Args:
        model: A student; its ``config`` is stored with it if it has one.
        path: The file to write.
        **extra: Anything JSON can hold, stored beside the configuration (run id, losses, ...).

    Returns:
        The path written.

    Raises:
        CheckpointError: If a weight is NaN or infinite; nothing is written then.
        TypeError: If an extra value cannot be stored as JSON.
        EnvironmentProblem: If the file cannot be written.
    """
    path = Path(path)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    broken = [n for n, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{len(broken)} tensors hold NaN or infinite numbers, the first is {broken[0]};"
            f" {path} was not written.",
            "Lower the learning rate or max_grad_norm and train again.",
        )
    config: Any = getattr(model, "config", None)
    config_values = config.to_dict() if hasattr(config, "to_dict") else {}
    about = {
        "format_version": FORMAT_VERSION,
        "model_class": type(model).__name__,
        "model_type": config_values.get("model_type"),
        "config": config_values,
        **extra,
    }
    metadata = json.dumps(without_nonfinite(about), default=_json_value, allow_nan=False)
    with disk_errors_explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model_state_dict": state, "metadata": metadata}
    return write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(
    path: str | Path, model: nn.Module | None = None, device: torch.device | str | None = None
) -> dict[str, Any]:
    """Read a file written by :func:`save_checkpoint`.

    Args:
        path: The file.
        model: If given, its weights are replaced by the file's, all of them or none.
        device: Where the tensors go; None is the CPU.

    Returns:
        ``model_state_dict`` (name -> tensor), ``model_type``, ``config`` and all ``metadata``.

    Raises:
        InputError: If there is no such file.
        CheckpointError: If it is damaged, foreign, of a newer format, or does not fit ``model``.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.", "Check the path of the checkpoint.")
    content = _read(path, device)
    metadata = content["metadata"]
    version = metadata.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}; this library reads up to {FORMAT_VERSION}.",
            "Upgrade the library, or save the student again with this one.",
        )
    if model is not None:
        _load_strictly(model, content["model_state_dict"], path)
    return {
        "model_state_dict": content["model_state_dict"],
        "model_type": metadata.get("model_type"),
        "config": metadata.get("config", {}),
        "metadata": metadata,
    }


def _read(path: Path, device: torch.device | str | None) -> dict[str, Any]:
    """Load with the restricted loader and check the shape of what comes out."""
    with path.open("rb") as file:
        head = file.read(200).lstrip().lower()
    if head.startswith((b"version https://git-lfs", b"<!doctype", b"<html", b"/annex/")):
        raise CheckpointError(
            f"{path} is a text file (an HTML page or a large-file pointer), not weights.",
            "Fetch the real file, for example with git lfs pull.",
        )
    try:
        content = torch.load(path, map_location=device or "cpu", weights_only=True)
    except Exception as error:  # the loader raises many types for damaged or foreign files
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of this library ({type(error).__name__}).",
            "It is damaged or was made by other software; use another copy or save it again.",
        ) from error
    metadata = _parsed(content.get("metadata")) if isinstance(content, dict) else None
    good = (
        metadata is not None
        and isinstance(content.get("model_state_dict"), dict)
        and all(isinstance(value, Tensor) for value in content["model_state_dict"].values())
    )
    if not good:
        raise CheckpointError(
            f"{path} loads, but is not a checkpoint of this library"
            " (expected model_state_dict and metadata).",
            "Pass a file written by save_checkpoint or by a distillation run.",
        )
    return {**content, "metadata": metadata}


def _parsed(metadata: Any) -> dict[str, Any] | None:
    """The metadata as a dictionary, or None if it is not one in JSON."""
    try:
        parsed = json.loads(metadata)
    except (TypeError, ValueError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _load_strictly(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load all tensors, or raise before any is changed."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name}: file {tuple(state[name].shape)}, model {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{path} does not fit the {type(model).__name__}: missing {missing[:3]},"
            f" unexpected {unexpected[:3]}, other shapes {sorted(shapes)[:3]}.",
            'Build the model from the file\'s own configuration (load_checkpoint(path)["config"]).',
        )
    model.load_state_dict(state, strict=True)


def _json_value(value: Any) -> Any:
    """JSON for the few non-JSON values a configuration holds; everything else is refused."""
    if isinstance(value, (torch.dtype, torch.device, Path)):
        return str(value)
    raise TypeError(f"save_checkpoint cannot store a {type(value).__name__}; pass plain values.")
