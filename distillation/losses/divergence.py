"""What the losses share: the divergence between two softmax distributions, and argument checks."""

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def tempered_kl(
    student: Float[Tensor, "*positions classes"],
    teacher: Float[Tensor, "*positions classes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """KL(teacher || student) of softened distributions, in nats, averaged over positions.

    ``temperature^2 * mean over positions of sum_c p_T(c) (log p_T(c) - log p_S(c))`` with
    ``p = softmax(scores / temperature)``, T the teacher and S the student. The factor keeps
    the gradient's size independent of the temperature (Hinton, Vinyals, Dean 2015,
    arXiv:1503.02531, section 2). Computed in float32 or wider; zero exactly when both agree.
    """
    log_p_student = F.log_softmax(at_least_float32(student) / temperature, dim=-1)
    log_p_teacher = F.log_softmax(at_least_float32(teacher) / temperature, dim=-1)
    per_position = F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(-1)
    return per_position.mean() * temperature**2


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is widened, float64 stays."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse shapes that would broadcast into a plausible but wrong number.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"Student and teacher shapes differ: {tuple(student.shape)} and {tuple(teacher.shape)}."
            " A loss needs equal shapes; use a stitching layer when the widths differ."
        )


def check_loss_choice(loss_type: str, known: tuple[str, ...], temperature: float) -> None:
    """Refuse unknown loss names and impossible temperatures.

    Raises:
        ValueError: If ``loss_type`` is not in ``known`` or ``temperature`` is not positive, finite.
    """
    if loss_type not in known:
        raise ValueError(f"Unknown loss type {loss_type!r}; known: {', '.join(sorted(known))}.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"The temperature is {temperature}, and it must be a positive number.")
