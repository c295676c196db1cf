"""The trainers: one training loop, and what the backbone and the head add to it."""

from distillation.trainers.backbone_trainer import BackboneDistillationTrainer
from distillation.trainers.base_trainer import BaseDistillationTrainer
from distillation.trainers.head_trainer import HeadDistillationTrainer

__all__ = ["BackboneDistillationTrainer", "BaseDistillationTrainer", "HeadDistillationTrainer"]
