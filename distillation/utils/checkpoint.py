"""One student in one ``.pt`` file: a dict of tensors and one JSON string, nothing else.

Loading never runs code from a file: only PyTorch's restricted loader is used, and the file holds
nothing that needs more. What the file may make this process allocate is bounded by the file's own
size. The string carries a checksum over itself and every tensor. Weights load strictly; a missing,
unexpected or mis-shaped tensor is an error.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cleangpt.checkpoints import refuse_nonfinite
from cleangpt.disk_errors import disk_errors_explained
from cleangpt.errors import CheckpointError, InputError
from cleangpt.integrity import is_as_sealed, parse_json_object, sealed
from cleangpt.metrics_log import without_nonfinite
from cleangpt.restricted_load import restricted_load
from cleangpt.run_directory import write_atomically
from cleangpt.runtime.module_state import tensors_fingerprint

FORMAT_VERSION = 2
"""From 2 on the metadata carries a checksum."""


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
    refuse_nonfinite(state, f"{path} was not written")
    config: Any = getattr(model, "config", None)
    config_values = config.to_dict() if hasattr(config, "to_dict") else {}
    about = {
        "format_version": FORMAT_VERSION,
        "model_class": type(model).__name__,
        "model_type": config_values.get("model_type"),
        "config": config_values,
        **extra,
    }
    plain = json.loads(json.dumps(without_nonfinite(about), default=_json_value))
    metadata = json.dumps(sealed(plain, tensors_fingerprint(state.items())))
    with disk_errors_explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model_state_dict": state, "metadata": metadata}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # its errors say what torch's do not: a full disk
            torch.save(content, file)

    needed = sum(tensor.nbytes for tensor in state.values()) + len(metadata)
    return write_atomically(path, write, needed)


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
        CheckpointError: If it is damaged, foreign, of another format, or does not fit ``model``.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.", "Check the path of the checkpoint.")
    state, metadata = _read(path)
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {metadata.get('format_version')!r}; this library reads"
            f" {FORMAT_VERSION}.",
            "Use the version of the library that wrote it, or save the student again with this"
            " one.",
        )
    if not is_as_sealed(metadata, tensors_fingerprint(state.items())):
        raise CheckpointError(
            f"{path} is damaged: it does not hold what was written to it (SHA-256 differs).",
            "Copy the file again, or use another copy.",
        )
    refuse_nonfinite(state, f"{path} is not used")
    if device is not None:
        state = {name: tensor.to(device) for name, tensor in state.items()}
    if model is not None:
        load_strictly(model, state, path)
    return {
        "model_state_dict": state,
        "model_type": metadata.get("model_type"),
        "config": metadata.get("config", {}),
        "metadata": metadata,
    }


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load with the restricted loader and check what comes out: tensors and metadata."""
    try:
        content = restricted_load(path)
    except ValueError as error:
        raise CheckpointError(
            f"{error}; it cannot be read as a checkpoint of this library.",
            "Fetch the real file (git lfs pull), use another copy, or save it again.",
        ) from error
    metadata = _parsed(content.get("metadata")) if isinstance(content, dict) else None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if metadata is None or state is None or not _is_plain_state(state):
        raise CheckpointError(
            f"{path} loads, but is not a checkpoint of this library"
            " (expected model_state_dict and metadata).",
            "Pass a file written by save_checkpoint or by a distillation run.",
        )
    # Tied weights are one storage under two names; more than that is not ours.
    size = path.stat().st_size
    if sum(tensor.nbytes for tensor in state.values()) > 2 * size:
        raise CheckpointError(
            f"{path} describes tensors larger than the file ({size:,} bytes).",
            "It was not written by this library; use another copy.",
        )
    return state, metadata


def _is_plain_state(state: Any) -> bool:
    """Whether it is a dictionary of ordinary tensors on the CPU, by name."""
    return isinstance(state, dict) and all(
        isinstance(name, str)
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        for name, tensor in state.items()
    )


def _parsed(metadata: Any) -> dict[str, Any] | None:
    """The metadata as a dictionary, or None if it is not one in JSON."""
    try:
        return parse_json_object(metadata)
    except (TypeError, ValueError):
        return None


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load all tensors, or raise before any is changed; arguments as ``check_fits`` has them."""
    check_fits(model, state, path)
    model.load_state_dict(state, strict=True)


def check_fits(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not exactly a model's own.

    Args:
        model: The model; one on PyTorch's "meta" device will do.
        state: The tensors, by name.
        path: Where they came from, for the message.

    Raises:
        CheckpointError: If a tensor is missing, unexpected, or has another shape.
    """
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


def _json_value(value: Any) -> Any:
    """JSON for the few non-JSON values a configuration holds; everything else is refused."""
    if isinstance(value, (torch.dtype, torch.device, Path)):
        return str(value)
    raise TypeError(f"save_checkpoint cannot store a {type(value).__name__}; pass plain values.")
