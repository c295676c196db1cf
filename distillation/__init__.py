"""Block-by-block distillation of causal language models."""

from distillation.distillation_trainer import DistillationTrainer

__all__ = ["DistillationTrainer"]
