"""The students of the quality study: of our kinds, and of the teacher's own architecture."""

import copy
from typing import Any, Final

from config_distillation import GPTConfig
from model import STUDENTS, build_student

FAMILYS_NAMES: Final = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
}


def built(kind: str, shape: dict[str, Any], teacher: Any) -> Any:
    """A student of one of our kinds; of another name, one of the teacher's own architecture."""
    if kind in STUDENTS:
        return build_student(GPTConfig(model_type=kind, dropout=0.0, **shape))
    config = copy.deepcopy(teacher.config)
    for name, value in shape.items():
        setattr(config, FAMILYS_NAMES.get(name, name), value)
    return type(teacher)(config)
