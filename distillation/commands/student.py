"""The student a command line describes: one of ours, a HuggingFace one, or one that exists."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillation.commands.flags import STUDENT_SWITCHES
from distillation.commands.student_flags import HF_STUDENT, holds_weights
from distillation.layer_map import LayerMap, standing_in

if TYPE_CHECKING:
    from torch import nn

    from cleangpt.teacher import Teacher
    from config_distillation import GPTConfig

logger = logging.getLogger(__name__)


def build_student(
    arguments: argparse.Namespace, teacher: "Teacher", get_model_class: Callable[[str], Any]
) -> "nn.Module":
    """Build or load the student the flags describe, for this teacher.

    Args:
        arguments: The parsed flags.
        teacher: Gives vocabulary, special tokens, and what no flag says.
        get_model_class: Gives the class of a kind of student.

    Raises:
        UsageError: If the flags do not describe a student.
        InputError: If a file they name does not hold one.
    """
    import torch

    torch.manual_seed(arguments.seed)
    student: Any
    if arguments.start_student:
        student = load_student(arguments.start_student, teacher, arguments.trust_remote_code)
    elif arguments.student_model_type == HF_STUDENT:
        name, blocks = arguments.student_config, arguments.student_n_layer
        chosen = standing_in(arguments.layer_map)
        student = hf_student(name, teacher) if name else student_like(teacher, blocks, chosen)
    else:
        config = student_config(arguments, teacher)
        student = get_model_class(arguments.student_model_type)(config=config)
    for name in ("bos_token_id", "eos_token_id"):
        for settings in (student.config, student.generation_config):
            setattr(settings, name, getattr(teacher.tokenizer, name))
    describe(student, teacher)
    return student


def describe(student: "nn.Module", teacher: "Teacher") -> None:
    """Log what the student is."""
    from cleangpt.blocks import BlockStack
    from cleangpt.structure import count_parameters

    stack = BlockStack(student)
    logger.info(
        "Student: %s, %d blocks of width %d, %s parameters; the teacher has %s",
        type(student).__name__,
        stack.num_blocks,
        stack.hidden_size,
        f"{count_parameters(student):,}",
        f"{count_parameters(teacher.model):,}",
    )


def load_student(name: str, teacher: "Teacher", trust_remote_code: bool) -> Any:
    """A student that exists: a run, a ``.pt`` file, or a HuggingFace folder.

    Raises:
        InputError: If a tokenizer lies beside it that is not the teacher's.
    """
    from distillation.evaluation.loading import check_same_vocabulary, load_model

    loaded = load_model(name, trust_remote_code=trust_remote_code)
    check_same_vocabulary(loaded, teacher.tokenizer)
    if loaded.vocabulary is None:
        logger.info("%s has no tokenizer; its ids are taken to be the teacher's.", name)
    return loaded.model.requires_grad_(True)


def hf_student(name: str, teacher: "Teacher") -> Any:
    """A HuggingFace causal LM: from a folder with weights as it is, from a configuration at random.

    A configuration that says nothing of its vocabulary gets the teacher's tokens.

    Raises:
        InputError: If there is no such file, or it is not the configuration of a causal LM, or a
            tokenizer lies beside it that is not the teacher's.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cleangpt.errors import InputError
    from cleangpt.teacher import check_causal
    from cleangpt.teacher_files import attention_of
    from cleangpt.vocabulary import token_rows

    path = Path(name)
    if holds_weights(name):
        return load_student(name, teacher, trust_remote_code=False)
    if path.is_dir():
        check_tokenizer_beside(path, teacher)
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**{"vocab_size": token_rows(teacher.tokenizer), **fields})
        student = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False, **attention_of(config)
        )
        check_causal(student.eval())
        return student
    except Exception as error:  # every family checks its fields with errors of its own
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"{file} is not the configuration of a causal language model: {cause}",
            'Give --student_config a JSON file with "model_type" and its fields, or a folder with'
            " a config.json.",
        ) from error


def student_like(teacher: "Teacher", num_blocks: int | None, layer_map: LayerMap) -> Any:
    """A student of the teacher's own architecture and width, with random weights.

    Where blocks differ in kind, as by sliding windows, each is of the kind of the one it starts
    from. What the teacher's vocabulary was padded with is left out.

    Args:
        teacher: Gives its configuration.
        num_blocks: None is as many as the teacher has.
        layer_map: The teacher block of each student block.

    Raises:
        UsageError: If the map does not fit.
        InputError: If the architecture does not come in that depth by its fields alone.
    """
    from cleangpt.blocks import BlockStack
    from cleangpt.errors import InputError
    from cleangpt.structure import with_blocks
    from cleangpt.vocabulary import token_rows
    from distillation.layer_map import choose_layer_map
    from distillation.teacher_init import first_of_groups

    model: Any = teacher.model
    depth = BlockStack(model).num_blocks
    sources = first_of_groups(choose_layer_map(layer_map, num_blocks or depth, depth))
    try:
        config = with_blocks(model.config, sources)
        text = config.get_text_config()
        text.vocab_size = token_rows(teacher.tokenizer)
        if (text.pad_token_id or 0) >= text.vocab_size:
            text.pad_token_id = None
        type(config).from_dict(config.to_dict())  # every family checks its fields here
        return type(model)(config).float().eval()
    except Exception as error:  # with errors of its own
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"There is no {type(model).__name__} of {len(sources)} such blocks: {cause}",
            "Write the whole configuration into a JSON file, and name it by --student_config.",
        ) from error


def check_tokenizer_beside(folder: Path, teacher: "Teacher") -> None:
    """Refuse a configuration that lies beside another tokenizer than the teacher's.

    Raises:
        InputError: With the first tokens that differ.
    """
    from cleangpt.vocabulary import check_same_tokens
    from distillation.evaluation.loading import vocabulary_of

    own = vocabulary_of(folder)
    if own is not None:
        remedy = "Take the tokenizer's files out of that folder, or choose another teacher."
        check_same_tokens(own, teacher.tokenizer.get_vocab(), str(folder), remedy)


def student_config(arguments: argparse.Namespace, teacher: "Teacher") -> "GPTConfig":
    """The architecture of one of our students; what no flag says follows from the teacher.

    Raises:
        UsageError: If the flags do not describe a student.
    """
    from cleangpt.blocks import BlockStack
    from cleangpt.errors import UsageError
    from cleangpt.vocabulary import token_rows
    from config_distillation import GPTConfig

    stack = BlockStack(teacher.model)
    n_head = arguments.student_n_head or teacher.model.config.get_text_config().num_attention_heads
    # Half of the teacher's width, rounded to heads of an even size.
    half = max(1, round(stack.hidden_size / (4 * n_head))) * 2 * n_head
    if stack.context_length is not None and arguments.block_size > stack.context_length:
        raise UsageError(
            f"--block_size {arguments.block_size} exceeds the teacher's context of"
            f" {stack.context_length}.",
            f"Pass --block_size {stack.context_length} or less.",
        )
    switches = {name: getattr(arguments, f"student_{name}") for name in STUDENT_SWITCHES}
    try:
        return GPTConfig(
            block_size=arguments.block_size,
            vocab_size=token_rows(teacher.tokenizer),  # a teacher's padded rows stand for nothing
            n_layer=arguments.student_n_layer or stack.num_blocks,
            n_head=n_head,
            n_embd=arguments.student_n_embd or half,
            dropout=arguments.student_dropout,
            padding_idx=teacher.tokenizer.pad_token_id,
            model_type=arguments.student_model_type,
            output_hidden_states=True,
            teacher_n_embd=stack.hidden_size,
            **switches,
        )
    except ValueError as error:
        cause = str(error).splitlines()[0]
        raise UsageError(cause, "Change the --student_... flags named above.") from error
