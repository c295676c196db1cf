"""Losses between a student and its teacher.

A loss is any callable of two tensors, ``(student, teacher)``, both of shape [positions, dim], that
returns the mean over positions. The training loop selects valid positions and weights by counts, so
a loss sees no padding and needs no mask.
"""

from distillation.losses.hidden_state_loss import DistillationLoss
from distillation.losses.logit_loss import LogitDistillationLoss
from distillation.losses.target_statistics import TargetStatistics

__all__ = ["DistillationLoss", "LogitDistillationLoss", "TargetStatistics"]
