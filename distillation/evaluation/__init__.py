"""Evaluation of a distilled student: does it behave like its teacher, and what does it cost?

Of the rest of ``distillation`` those that read or show a finished student import this package:
``commands``, ``export``, ``report``, and ``model_card`` for its escaping; trainers never. Importing
it is cheap: torch, matplotlib and ``datasets`` are loaded only by what needs them. Read
``results.py`` first (what is measured, key by key), then ``evaluator.py`` (how it is put together).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distillation.evaluation.evaluator import evaluate as evaluate
    from distillation.evaluation.results import (
        EvaluationResult as EvaluationResult,
        EvaluationSettings as EvaluationSettings,
    )

__all__ = ["EvaluationResult", "EvaluationSettings", "evaluate"]


def __getattr__(name: str) -> object:
    """Load the public names on first use, so that ``--help`` does not wait for torch."""
    if name == "evaluate":
        from distillation.evaluation.evaluator import evaluate

        return evaluate
    if name in ("EvaluationResult", "EvaluationSettings"):
        from distillation.evaluation import results

        return getattr(results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
