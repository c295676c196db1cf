"""The trainers: one training loop, and what backbone, head and polish add to it."""

from distillation.trainers.backbone_trainer import BackboneDistillationTrainer
from distillation.trainers.base_trainer import BaseDistillationTrainer
from distillation.trainers.head_trainer import HeadDistillationTrainer
from distillation.trainers.polish_trainer import PolishDistillationTrainer

__all__ = [
    "BackboneDistillationTrainer",
    "BaseDistillationTrainer",
    "HeadDistillationTrainer",
    "PolishDistillationTrainer",
]
