"""The students, as HuggingFace models, and the one registry that names them.

Adding a student is a class and a line: subclass ``StudentModel`` (or a kind below) and enter it in
``STUDENTS``. Files here travel with every exported student; they import only torch, transformers,
the standard library and, relatively, each other. Read ``model_vanilla_distillation.py`` first.
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


for _student_class in list(STUDENTS.values()):
    _config_class = _student_class.config_class
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _student_class, exist_ok=True)
