"""What the flags of a student that exists already mean for the others."""

import argparse
import logging
from pathlib import Path

from cleangpt.errors import UsageError

logger = logging.getLogger(__name__)

HF_STUDENT = "hf"


def check_student_flags(arguments: argparse.Namespace, named: set[str]) -> None:
    """Refuse flags of a student's shape where something else decides it."""
    is_hf = arguments.student_model_type == HF_STUDENT
    if arguments.student_config and not is_hf and not arguments.start_student:
        raise UsageError(
            "--student_config is of a student that transformers builds.",
            "Add --student_model_type hf, or leave --student_config out.",
        )
    shape = {n for n in named if n.startswith("student_")}
    decides, idle, other = "--start_student", shape, ""
    if not arguments.start_student and arguments.student_config:
        decides, idle = "--student_config", shape - {"student_model_type", "student_config"}
    elif not arguments.start_student:
        decides = "the teacher's configuration"
        idle = shape - {"student_model_type", "student_n_layer"} if is_hf else set()
        other = "; another shape of that kind takes a JSON file by --student_config"
    if idle:
        raise UsageError(
            f"{decides} decides the student, so --{', --'.join(sorted(idle))} would do nothing.",
            f"Leave them out{other}.",
        )


def keep_own_weights(arguments: argparse.Namespace, named: set[str]) -> None:
    """Let a student that has weights start as it is, its head too, unless flags say otherwise."""
    config = arguments.student_config
    if not arguments.start_student and not (config and holds_weights(config)):
        return
    if "init_from_teacher" not in named:
        arguments.init_from_teacher = "none"
    if "initialize_head_from_teacher" not in named:
        arguments.initialize_head_from_teacher = False
        logger.info(
            "The student starts from its own weights, its head too;"
            " --initialize_head_from_teacher gives it the teacher's."
        )


def holds_weights(name: str) -> bool:
    """Whether a name is that of a folder with a model's weights."""
    path = Path(name)
    return path.is_dir() and any([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])
