"""What of a teacher's files is looked at before a library reads them, and what is asked of it then.

Some damage keeps a library busy for ever, some hostile configurations make it build what no file
holds. Used by ``teacher`` and by whoever loads a HuggingFace folder.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cleangpt.errors import InputError
from cleangpt.integrity import check_sums
from cleangpt.structure import count_parameters
from cleangpt.teacher_source import TEACHER_FLAG, TeacherSource
from cleangpt.weight_files import check_blocks, check_file, check_folder, weight_files

PARAMETERS_PER_BYTE = 16
"""More than any quantisation packs into one."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "tekken.json")
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


def check_files(source: TeacherSource) -> int:
    """Refuse weights that are none, or not what was written; return how many tensors there are.

    A hub name's files are looked at once they are in the cache.

    Raises:
        InputError: If a file cannot be what its name says.
        CheckpointError: If the folder lists checksums and a file has another.
    """
    folder = source.folder()
    if folder is None:
        return 0
    try:
        if source.gguf_file:
            return check_file(folder / source.gguf_file)
        tensors = check_folder(folder)
    except ValueError as error:
        raise unreadable(source, error) from error
    check_sums(folder)
    return tensors


def check_size(source: TeacherSource, config: Any, tensors: int) -> None:
    """Refuse a configuration of a model that the files are far too small for.

    Raises:
        InputError: If they are.
    """
    folder = source.folder()
    files = [] if folder is None else weight_files(folder)
    if source.gguf_file and folder is not None:
        files = [folder / source.gguf_file]
    if not files or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    size = sum(path.stat().st_size for path in files)
    try:
        check_blocks(config, tensors)
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **attention_of(config)
            )
        parameters = count_parameters(outline)
        if parameters > PARAMETERS_PER_BYTE * size:
            raise ValueError(f"{parameters:,} parameters are described, in {size:,} bytes of files")
    except Exception as error:  # every family checks its fields with errors of its own
        raise unreadable(source, error) from error


def mismatched_shapes(
    source: TeacherSource, model: PreTrainedModel, report: Any
) -> list[tuple[str, Any, Any]]:
    """Weights that do not fit: name, shape in the file, shape by the configuration."""
    known: list[tuple[str, Any, Any]] = list(report["mismatched_keys"])
    if known or not source.gguf_file:
        return known
    # Before 5.23, transformers takes a GGUF file's tensors in any shape.
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(model.config, **attention_of(model.config))
    needed = {name: parameter.shape for name, parameter in outline.named_parameters()}
    return [
        (name, parameter.shape, needed[name])
        for name, parameter in model.named_parameters()
        if parameter.shape != needed.get(name, parameter.shape)
    ]


def attention_of(config: Any, known: Any = None) -> dict[str, str]:
    """The attention to ask for: a ``config.json`` may otherwise choose the kernel that is loaded.

    Args:
        config: The model's configuration.
        known: The model's class; None finds the one of transformers, and chooses nothing where the
            model brings a class of its own.
    """
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if known is None and type(config) not in causal:
        return {}
    model_class = known or causal[type(config)]
    return {"attn_implementation": "sdpa" if model_class._supports_sdpa else "eager"}


def read_tokenizer(source: TeacherSource) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights.

    Raises:
        InputError: If there is none, or it cannot be saved beside a student.
    """
    missing = InputError(
        f"teacher {source.label} has no tokenizer; looked for {', '.join(TOKENIZER_FILES)}.",
        "Save it there with tokenizer.save_pretrained(folder): the ids must be the teacher's own.",
    )
    if source.is_local and not source.gguf_file:
        # Without files some families give an empty tokenizer and no error.
        folder = Path(source.location)
        if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
            raise missing
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.options())
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise missing from error
    if len(tokenizer) < 2:
        raise missing
    _check_template_names(source, tokenizer)
    return tokenizer


def _check_template_names(source: TeacherSource, tokenizer: Any) -> None:
    """Refuse names of chat templates that would lead elsewhere when the tokenizer is saved.

    Raises:
        InputError: If there is one.
    """
    templates = tokenizer.chat_template
    names = list(templates) if isinstance(templates, dict) else []
    unsafe = [name for name in names if not _TEMPLATE_NAME.fullmatch(str(name))]
    if unsafe:
        raise InputError(
            f"the tokenizer of teacher {source.label} has a chat template named {unsafe[0]!r},"
            " which cannot be the name of a file.",
            f"Give {TEACHER_FLAG} another model; this one was made to write outside its folder.",
        )


def unreadable(source: TeacherSource, error: BaseException) -> InputError:
    """The error for files that are damaged or foreign."""
    return InputError(
        f"teacher {source.label} cannot be read: {one_line(error)}",
        f"Fetch or save the model again, or give {TEACHER_FLAG} another one.",
    )


def one_line(error: BaseException) -> str:
    """What a library's error says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
