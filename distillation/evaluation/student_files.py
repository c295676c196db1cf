"""A student from a ``.pt`` file or a run's checkpoint: class by what is saved, weights strictly.

What the configuration describes is compared with the tensors in the file before anything of
that size is built.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import model as students
from cleangpt.blocks import BlockStack
from cleangpt.checkpoints import Checkpoints
from cleangpt.errors import CheckpointError, InputError, UsageError
from cleangpt.manifest import read_manifest
from cleangpt.teacher_files import attention_of
from cleangpt.weight_files import check_blocks
from distillation.head_init import untie_lm_head
from distillation.utils.checkpoint import check_fits, load_checkpoint, load_strictly


def load_pt(path: Path, model_type: str | None) -> tuple[nn.Module, str]:
    """Load a checkpoint of ours, and say what it is for tables.

    Args:
        path: The file.
        model_type: The kind of student expected; None takes what is saved.

    Raises:
        InputError: If the class that was saved is not registered.
        CheckpointError: If the file is damaged or foreign.
        UsageError: If ``model_type`` is not the saved type.
    """
    saved = load_checkpoint(path)
    metadata, state = saved["metadata"], saved["model_state_dict"]
    saved_type = str(saved["model_type"])
    found = saved_type, metadata.get("model_class"), saved["config"]
    student = _built(path, found, state, model_type)
    load_strictly(student, state, path)
    return student, _label(saved_type, metadata.get("step"), metadata.get("total_steps"))


def load_unfinished(run_dir: Path, model_type: str | None) -> tuple[nn.Module, str] | None:
    """The student as a run that is going on, or was stopped, last saved it; None if it never did.

    Args:
        run_dir: A run's directory, with its manifest.
        model_type: The kind of student expected; None takes what is saved.

    Raises:
        CheckpointError: If all checkpoints are damaged.
    """
    folder = run_dir / "checkpoints"
    manifest = (read_manifest(run_dir) or {}) if folder.is_dir() else {}
    config = manifest.get("student_config")
    if config is None:
        return None
    found = Checkpoints(folder, str(manifest["run_id"]), writes=False).newest()
    if found is None:
        return None
    prefix = "weights/student/"
    state = {n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)}
    saved_type = str(config.get("model_type"))
    own = saved_type, manifest["student"]["class"], config
    student = _built(folder, own, state, model_type)
    if not found.state["head_is_tied"]:
        untie_lm_head(BlockStack(student))
    load_strictly(student, state, folder)
    label = _label(saved_type, found.state["steps"], manifest.get("total_steps"))
    # Steps of decoupled blocks are counted apart, and are in no checkpoint of the whole.
    return student, f"{label} (unfinished)" if label == saved_type else label


def _label(name: str, step: Any, total: Any) -> str:
    """The name that tables and plots show: of half a training, how much it was."""
    unfinished = isinstance(step, int) and isinstance(total, int) and step < total
    return f"{name} (step {step} of {total})" if unfinished else name


def _built(
    path: Path,
    found: tuple[str, str | None, dict[str, Any]],
    state: dict[str, torch.Tensor],
    model_type: str | None,
) -> nn.Module:
    """A new model that the tensors fit, of the type, class and configuration that were found."""
    saved_type, class_name, fields = found
    known = student_class(saved_type, class_name, model_type, path)
    config = _config_of(path, saved_type, class_name, fields, known)
    build: Callable[[], nn.Module] = partial(known or _stock_model, config)
    try:
        check_blocks(config, len(state))
        with torch.device("meta"):
            outline = build()
    except Exception as error:  # every family checks its fields with errors of its own
        raise _no_model(path, error) from error
    check_fits(outline, state, path)
    return build()


def _config_of(
    path: Path, saved_type: str, class_name: str | None, fields: dict[str, Any], known: Any
) -> Any:
    """The configuration in the file: of a class we know, or of one that comes with transformers."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    # What computes attention is this process's choice and never the file's.
    fields = {name: value for name, value in fields.items() if "_implementation" not in name}
    try:
        if known is not None:
            return known.config_class.from_dict(fields)
        if saved_type in CONFIG_MAPPING and hasattr(transformers, str(class_name)):
            config = AutoConfig.for_model(**fields)
            if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                return config
    except Exception as error:
        raise _no_model(path, error) from error
    raise InputError(
        f"{path} holds a student of type {saved_type!r}, which is not registered.",
        f"Enter its class in model.STUDENTS; known: {', '.join(sorted(students.STUDENTS))}.",
    )


def _no_model(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The configuration in {path} does not describe a model: {first_line(error)}",
        "It is damaged or was made by other software; use another copy.",
    )


def _stock_model(config: Any) -> nn.Module:
    """A student whose class comes with transformers, with weights still to be loaded."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=False, **attention_of(config)
    )


def student_class(
    saved_type: str, class_name: str | None, model_type: str | None, path: Path
) -> Any:
    """The registered class to load with, or None if no student has that type of configuration.

    That is the class ``model_type`` names, else the one that was saved, else (in files that do not
    tell) the first one with such a configuration.
    """
    fitting = {
        name: each
        for name, each in students.STUDENTS.items()
        if each.config_class.model_type.lower() == saved_type.lower()
    }
    if model_type is not None:
        for name, each in fitting.items():
            if name.lower() == model_type.lower():
                return each
        if model_type.lower() != saved_type.lower():
            raise UsageError(
                f"--model_type is {model_type}, but {path} holds a {saved_type} model.",
                f"Use --model_type {saved_type}, or leave the flag out.",
            )
    for each in fitting.values():
        if class_name in (None, each.__name__):
            return each
    if fitting:
        stock = next(iter(fitting))
        raise InputError(
            f"{path} was saved from class {class_name}, which is not registered; as a plain "
            f"{stock} it could compute something else.",
            f'Register it before loading: model.STUDENTS["{class_name}"] = {class_name}; '
            f"or say --model_type {stock} to load it as that.",
        )
    return None


def first_line(error: Exception) -> str:
    """What a library's error says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
