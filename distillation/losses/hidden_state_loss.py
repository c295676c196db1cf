"""Losses between (stitched) student hidden states and teacher hidden states."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from distillation.losses.divergence import (
    at_least_float32,
    check_loss_choice,
    check_same_shape,
    tempered_kl,
)


class DistillationLoss(nn.Module):
    """Distance between two sets of hidden states, averaged over positions.

    ``mse`` is the mean squared error over positions and channels (FitNets, Romero et al. 2015,
    arXiv:1412.6550, eq. 3). ``kl_div`` reads each state as scores, takes the softmax over channels,
    and returns KL(teacher || student) in nats times temperature squared; it is blind to a constant
    added to a state, so prefer ``mse`` unless you want just that.

    Args:
        loss_type: "mse" or "kl_div".
        temperature: Softmax temperature of ``kl_div``, dimensionless, > 0. ``mse`` does not use it.

    Raises:
        ValueError: If ``loss_type`` is unknown or ``temperature`` is not positive.

    Example:
        >>> import torch
        >>> states = torch.randn(5, 8)
        >>> DistillationLoss("mse")(states, states).item()
        0.0
    """

    LOSS_TYPES: ClassVar[tuple[str, ...]] = ("mse", "kl_div")

    def __init__(self, loss_type: str = "mse", temperature: float = 1.0) -> None:
        super().__init__()
        check_loss_choice(loss_type, self.LOSS_TYPES, temperature)
        self.loss_type = loss_type
        self.temperature = temperature

    def forward(
        self,
        student_outputs: Float[Tensor, "..."],
        teacher_outputs: Float[Tensor, "..."],
    ) -> Float[Tensor, ""]:
        """Return the mean over positions; both have shape [positions, dim] (or more leading axes).

        Raises:
            ValueError: If the shapes differ.
        """
        check_same_shape(student_outputs, teacher_outputs)
        if self.loss_type == "kl_div":
            return tempered_kl(student_outputs, teacher_outputs, self.temperature)
        return F.mse_loss(at_least_float32(student_outputs), at_least_float32(teacher_outputs))
