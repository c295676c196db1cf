"""The students, as HuggingFace models, and the one registry that names them.

Adding a student is a class and a line: subclass ``StudentModel`` (or a kind below) and enter it in
``STUDENTS``; the commands offer the names in ``config_distillation.MODEL_TYPES``. Files here travel
with every exported student; they import only torch, transformers, the standard library and,
relatively, each other. Read ``model_vanilla_distillation.py`` first.
"""

from typing import Any, Final

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration import FactoredConfig, SASPConfig, StudentConfig, VanillaConfig
from .model_SASPV_distillation import SASPTransformerModelDistillation
from .model_token_factored_distillation import FactoredTransformerModelDistillation
from .model_vanilla_distillation import VanillaTransformerModelDistillation
from .student import StudentModel

__all__ = [
    "STUDENTS",
    "FactoredConfig",
    "FactoredTransformerModelDistillation",
    "SASPConfig",
    "SASPTransformerModelDistillation",
    "StudentConfig",
    "StudentModel",
    "VanillaConfig",
    "VanillaTransformerModelDistillation",
    "build_student",
    "get_model_class",
]

STUDENTS: Final[dict[str, type[StudentModel]]] = {
    "Vanilla": VanillaTransformerModelDistillation,
    "Factored": FactoredTransformerModelDistillation,
    "SASP": SASPTransformerModelDistillation,
}


def get_model_class(model_type_name: str) -> type[StudentModel]:
    """Return the student class of that name, in any case.

    Raises:
        ValueError: If no student has that name.
    """
    for name, student_class in STUDENTS.items():
        if name.lower() == model_type_name.lower():
            return student_class
    raise ValueError(
        f"Unsupported student model type: {model_type_name}\n"
        f"Choose one of {', '.join(sorted(STUDENTS))}, or enter your class in model.STUDENTS."
    )


def build_student(config: Any) -> StudentModel:
    """Return a new student of the kind that ``config.model_type`` names."""
    return get_model_class(config.model_type)(config)


def _register_with_transformers() -> None:
    """Let the ``Auto`` classes find the students.

    A configuration stands for the first class entered with it: a subclass that shares it cannot
    take over the folders of the kind it derives from.
    """
    seen = set()
    for student_class in STUDENTS.values():
        config_class = student_class.config_class
        if config_class in seen:
            continue
        seen.add(config_class)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, student_class, exist_ok=True)


_register_with_transformers()
