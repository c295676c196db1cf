"""Find and load the model that a path names: a checkpoint, a run, or a HuggingFace folder.

A student loads strictly: a missing or unexpected tensor is an error, since a model that is partly
random still produces plausible numbers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import model as students
from cleangpt.data import TextDataset
from cleangpt.data.overlap import contained_share
from cleangpt.errors import CheckpointError, EnvironmentProblem, InputError, ran_out_of_memory
from cleangpt.hub import local_path
from cleangpt.integrity import check_sums, parse_json_object
from cleangpt.manifest import read_manifest
from cleangpt.teacher import load_teacher, quiet_libraries
from cleangpt.teacher_files import TOKENIZER_FILES, attention_of
from cleangpt.teacher_source import TEACHER_FLAG
from cleangpt.vocabulary import check_same_tokens
from cleangpt.weight_files import check_blocks, check_file, check_folder
from distillation.evaluation.student_files import (
    first_line,
    load_pt,
    load_unfinished,
    student_class,
)
from distillation.evaluation.training_record import local_errors, saved_layer_map
from stitching_layers import StitchingLayers, load_stitches

T = TypeVar("T")

CHECKPOINT_NAME = "student_model_final_distilled.pt"
STITCHES_NAME = "stitching_layers.safetensors"


@dataclass(frozen=True)
class LoadedModel:
    """A model to evaluate, and what lies beside it.

    Args:
        model: In eval mode, fp32, on the device.
        name: For tables.
        source: The path or name it was loaded from.
        run_dir: The run it belongs to; where ``evaluation`` goes by default.
        stitches: The run's stitching layers, if saved.
        vocabulary: Token to id, if a tokenizer lies beside it.
        notes: What the report must say about it, such as an unfinished run.
        local_errors: Student block to its relative error when it had learnt, if the run tells.
        layer_map: The teacher block that each student block learnt from, if the run tells.
    """

    model: nn.Module
    name: str
    source: str
    run_dir: Path
    stitches: StitchingLayers | None = None
    vocabulary: dict[str, int] | None = None
    notes: tuple[str, ...] = ()
    local_errors: dict[int, float] = field(default_factory=dict)
    layer_map: tuple[int, ...] | None = None


def load_model(
    name: str,
    *,
    model_type: str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    flag: str = "--model_path",
) -> LoadedModel:
    """Load what ``name`` stands for.

    Args:
        name: A ``.pt`` checkpoint, a run directory, a HuggingFace folder, a ``.gguf`` file, or any
            name that works for a teacher.
        model_type: The kind of student expected; None takes what is saved. A name in
            ``model.STUDENTS`` whose class reads the saved configuration decides the class.
        device: Where the model goes.
        trust_remote_code: Whether code inside a HuggingFace folder may run.
        flag: The flag ``name`` came from, for messages.

    Raises:
        InputError: If there is no model, or not one that can be used, or its class is unknown.
        CheckpointError: If a file is damaged, foreign, or of an unfinished run.
        UsageError: If ``model_type`` is not the saved type.
    """
    path = local_path(name, flag=flag, suffixes=(".pt", ".gguf"))
    if path is None or path.suffix == ".gguf":
        return _load_like_teacher(name, device, trust_remote_code, flag)
    unfinished = _load_half_way(path, model_type, device)
    if unfinished is not None:
        return unfinished
    location = _locate(path)
    if location.suffix == ".gguf":
        return _load_like_teacher(str(location), device, trust_remote_code, flag)
    run_dir = location.parent
    if location.is_dir():
        loaded, label = _load_folder(location, model_type, trust_remote_code), _label(location)
    else:
        loaded, label = load_pt(location, model_type)
    folder = location if location.is_dir() else run_dir / "final"
    is_run = not location.is_dir() or location.name == "final"
    return LoadedModel(
        model=loaded.to(device).eval(),
        name=label,
        source=str(location),
        run_dir=run_dir,
        stitches=_stitches_of(run_dir) if is_run else None,
        vocabulary=vocabulary_of(folder),
        notes=_run_notes(run_dir) if is_run else (),
        local_errors=local_errors(run_dir) if is_run else {},
        layer_map=saved_layer_map(run_dir) if is_run else None,
    )


def _load_half_way(
    path: Path, model_type: str | None, device: torch.device | str
) -> LoadedModel | None:
    """The student of a run that has no result yet; None if there is one, or no checkpoint."""
    has_result = any((path / name).exists() for name in ("final", CHECKPOINT_NAME))
    if has_result or not (path / "manifest.json").is_file():
        return None
    found = load_unfinished(path, model_type)
    if found is None:
        return None
    loaded, label = found
    source = str(path / "checkpoints")
    return LoadedModel(
        model=loaded.to(device).eval(),
        name=label,
        source=source,
        run_dir=path,
        notes=_run_notes(path),
        layer_map=saved_layer_map(path),
    )


def _load_like_teacher(
    name: str, device: torch.device | str, trust_remote_code: bool, flag: str
) -> LoadedModel:
    try:
        teacher = load_teacher(name, device=device, trust_remote_code=trust_remote_code)
    except (InputError, EnvironmentProblem) as error:
        raise type(error)(error.cause, error.remedy.replace(TEACHER_FLAG, flag)) from error
    vocabulary = dict(teacher.tokenizer.get_vocab())
    return LoadedModel(teacher.model, teacher.name, teacher.source, Path(), None, vocabulary)


def _locate(path: Path) -> Path:
    """The checkpoint file or HuggingFace folder that a path means."""
    if path.is_file():
        return path
    if (path / "final" / "config.json").is_file():
        return path / "final"
    if (path / CHECKPOINT_NAME).is_file():
        return path / CHECKPOINT_NAME
    if (path / "manifest.json").is_file():
        raise CheckpointError(
            f"{path} is an unfinished run without a checkpoint: it holds neither final/ nor"
            f" {CHECKPOINT_NAME}.",
            "Let the run go on until it has saved something (--checkpoint_steps), or to its end.",
        )
    if (path / "config.json").is_file():
        return path
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) == 1:
        return gguf[0]
    raise InputError(
        f"{path} holds no model: no final/, no {CHECKPOINT_NAME}, no config.json.",
        "Name a .pt checkpoint, a run directory, or a HuggingFace folder.",
    )


def _load_folder(folder: Path, model_type: str | None, trust_remote_code: bool) -> nn.Module:
    """A HuggingFace folder: a student by the class that was saved, others as transformers finds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_sums(folder)
    config = _read_json(folder / "config.json")
    tensors = _usable(folder, partial(check_folder, folder))
    loader: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    has_code = "AutoModelForCausalLM" in _as(dict, config.get("auto_map"))
    known: Any = None
    if model_type is not None or not (trust_remote_code and has_code):
        class_name = next(iter(_as(list, config.get("architectures"))), None)
        known = student_class(str(config.get("model_type")), class_name, model_type, folder)
    read = AutoConfig.from_pretrained
    if known is not None:
        loader, options, read = known, {}, known.config_class.from_pretrained
    settings = _explained(folder, lambda: read(folder, local_files_only=True, **options))
    _usable(folder, partial(check_blocks, settings, tensors))
    loaded, info = _explained(
        folder,
        lambda: loader.from_pretrained(
            folder,
            config=settings,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **attention_of(settings, known),
            **options,
        ),
    )
    lost = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys") if info.get(key)}
    if lost:
        raise CheckpointError(
            f"The weights in {folder} do not fit its config.json: {json.dumps(lost)[:300]}.",
            "Save the model again with save_pretrained, or use another copy.",
        )
    return loaded


def _as(kind: type[T], value: Any) -> T:
    """A value of a file if it is of that kind, else an empty one."""
    return value if isinstance(value, kind) else kind()


def _usable(place: Path, check: Callable[[], T]) -> T:
    """What a check of files returns; its refusal as ours."""
    try:
        return check()
    except ValueError as error:
        raise CheckpointError(
            f"{place} cannot be used: {error}.",
            "Fetch the real files (git lfs pull), or copy or save the model again.",
        ) from error


def _explained(folder: Path, load: Callable[[], Any]) -> Any:
    """Turn the library's many errors about unusable folders into ours."""
    try:
        with quiet_libraries():
            return load()
    except (ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{folder} is not a causal language model that transformers can load: "
            f"{first_line(error)}",
            "Name a folder of a decoder-only model; one with its own code needs "
            "--trust_remote_code.",
        ) from error
    except Exception as error:  # weights that are damaged or hostile break the library in any way
        if ran_out_of_memory(error):
            raise
        raise CheckpointError(
            f"The weights in {folder} cannot be read: {first_line(error)}",
            "The folder is incomplete or damaged; copy or save the model again.",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json_object(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable JSON object.",
            "The file is damaged; copy or save the model again.",
        ) from error


def _label(folder: Path) -> str:
    """A short name: the student's type, or the folder's name for a foreign model."""
    model_type = str(_read_json(folder / "config.json").get("model_type"))
    known = {name.lower() for name in students.STUDENTS}
    return model_type if model_type.lower() in known else folder.resolve().name


def _stitches_of(run_dir: Path) -> StitchingLayers | None:
    """The stitching layers saved beside a student."""
    path = run_dir / STITCHES_NAME
    if not path.is_file():
        return None
    _usable(path, partial(check_file, path))
    try:
        return load_stitches(path)
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be used: {first_line(error)}",
            "Copy the run again, or move the file away to fit stitches anew.",
        ) from error


def vocabulary_of(folder: Path) -> dict[str, int] | None:
    """Token to id of the tokenizer in a folder; None if there is none."""
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    tokenizer = _explained(
        folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True)
    )
    return dict(tokenizer.get_vocab())


def _run_notes(run_dir: Path) -> tuple[str, ...]:
    """What the manifest says about a run that is not done."""
    status = (read_manifest(run_dir) or {}).get("status", "done")
    return (
        () if status == "done" else (f"The run in {run_dir} is not done: its status is {status}.",)
    )


def share_trained_on(loaded: LoadedModel, texts: Sequence[str], tokenizer: Any) -> float:
    """Estimate the share of ``texts`` the run trained on, by its manifest; 0.0 if it says nothing.

    See :mod:`cleangpt.data.overlap`.
    """
    sketch = (read_manifest(loaded.run_dir) or {}).get("data_sketch")
    if not sketch:
        return 0.0
    return contained_share(TextDataset(texts, tokenizer, block_size=2).tokens, sketch)


def check_same_vocabulary(loaded: LoadedModel, teacher_tokenizer: Any) -> None:
    """Refuse to compare models whose token ids mean different things.

    Raises:
        InputError: If a token has different ids in the two vocabularies, or is in one of them only.
    """
    if loaded.vocabulary is None:
        return
    check_same_tokens(
        loaded.vocabulary,
        teacher_tokenizer.get_vocab(),
        loaded.name,
        "Name the teacher the student was distilled from (--teacher_model_name_or_path,"
        " --teacher_model_name).",
    )
