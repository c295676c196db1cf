"""The evaluation's flags for the student of a run, from the settings of its training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVALUATE = ("python", "-m", "distillation.evaluation.evaluate_distilled_model")

_FROM_TRAINING = {
    "teacher_model_name_or_path": "--teacher_model_name",
    "teacher_revision": "--teacher_revision",
    "teacher_device_map": "--teacher_device_map",
    "dataset_name": "--dataset_name",
    "dataset_config_name": "--dataset_config_name",
    "dataset_text_column": "--dataset_text_column",
}

STREAMED_DOCUMENTS = 200
"""Of a data set without an end, what an evaluation reads."""


def evaluation_flags(settings: Mapping[str, Any]) -> list[str]:
    """Teacher and held-out text as the training named them.

    Args:
        settings: The training's settings by name; what is missing is the default.
    """
    words = []
    for name, flag in _FROM_TRAINING.items():
        if settings.get(name):
            words += [flag, str(settings[name])]
    if _is_published(str(settings.get("dataset_name") or "builtin")):
        # Ours always have a test split; a published data set may only have this one.
        words += ["--dataset_split", "validation"]
    if settings.get("streaming"):
        words += ["--streaming", "--max_samples", str(STREAMED_DOCUMENTS)]
    return words


def _is_published(data: str) -> bool:
    try:
        return data != "builtin" and not Path(data).exists()
    except OSError:  # too long for a path
        return True
