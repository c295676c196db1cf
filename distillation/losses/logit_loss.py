"""Losses between student logits and teacher logits."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from distillation.losses.divergence import (
    DivergenceKernel,
    at_least_float32,
    check_loss_choice,
    check_same_shape,
    tempered_kl,
)


class LogitDistillationLoss(nn.Module):
    """Distance between two sets of logits, averaged over positions.

    * ``kl_div``: KL(teacher || student) in nats per token, softened by the temperature and
      multiplied by its square (Hinton, Vinyals, Dean 2015, arXiv:1503.02531). Zero for a perfect
      student.
    * ``mse``: mean squared error over positions and vocabulary. The temperature is not used.
    * ``ce``: cross-entropy in nats per token against the teacher's most probable token. A perfect
      student does not reach zero. The soft form is ``kl_div``. With a temperature the
      student's logits are softened and the loss multiplied by its square, as in ``kl_div``.

    Args:
        loss_type: "kl_div", "mse" or "ce".
        temperature: Softmax temperature, dimensionless, > 0.

    Raises:
        ValueError: If ``loss_type`` is unknown or ``temperature`` is not positive.

    Example:
        >>> import torch
        >>> logits = torch.randn(5, 8)
        >>> LogitDistillationLoss()(logits, logits).item()
        0.0
    """

    LOSS_TYPES: ClassVar[tuple[str, ...]] = ("kl_div", "mse", "ce")

    def __init__(self, loss_type: str = "kl_div", temperature: float = 2.0) -> None:
        super().__init__()
        check_loss_choice(loss_type, self.LOSS_TYPES, temperature)
        self.loss_type = loss_type
        self.temperature = temperature
        self.kernel = DivergenceKernel()  # of "kl_div"; compiled with ``compile_blocks``

    def forward(
        self,
        student_logits: Float[Tensor, "..."],
        teacher_logits: Float[Tensor, "..."],
    ) -> Float[Tensor, ""]:
        """Return the mean over positions; both have shape [positions, vocab] (or more axes).

        Raises:
            ValueError: If the shapes differ.
        """
        check_same_shape(student_logits, teacher_logits)
        if self.loss_type == "kl_div":
            kernel = self.kernel if self.kernel.is_compiled else None
            return tempered_kl(student_logits, teacher_logits, self.temperature, kernel)
        student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits)
        if self.loss_type == "mse":
            return F.mse_loss(student, teacher)
        vocab = student.shape[-1]
        softened = student.reshape(-1, vocab) / self.temperature
        loss = F.cross_entropy(softened, teacher.reshape(-1, vocab).argmax(-1))
        return loss * self.temperature**2
