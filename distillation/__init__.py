"""Block-by-block distillation of causal language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillation.distillation_trainer import DistillationTrainer

__all__ = ["DistillationTrainer"]


def __getattr__(name: str) -> Any:
    """Load the trainer when it is asked for: ``--help`` of the evaluation must not load torch."""
    if name == "DistillationTrainer":
        from distillation.distillation_trainer import DistillationTrainer

        return DistillationTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
