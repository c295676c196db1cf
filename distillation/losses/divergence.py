"""What the losses share: the divergence between two softmax distributions, and argument checks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_ELEMENTS_AT_ONCE = {True: 2**18, False: 2**26}
"""Per step, on the CPU (1 MB of float32, a core's cache) and on an accelerator (few launches)."""


def tempered_kl(
    student: Float[Tensor, "*positions classes"],
    teacher: Float[Tensor, "*positions classes"],
    temperature: float,
    kernel: "DivergenceKernel | None" = None,
) -> Float[Tensor, ""]:
    """KL(teacher || student) of softened distributions, in nats, averaged over positions.

    ``temperature^2 * mean over positions of sum_c p_T(c) (log p_T(c) - log p_S(c))`` with
    ``p = softmax(scores / temperature)``, T the teacher and S the student. The factor keeps
    the gradient's size independent of the temperature (Hinton, Vinyals, Dean 2015,
    arXiv:1503.02531, section 2). Computed in float32 or wider; zero exactly when both agree.
    Only the student gets a gradient, ``temperature * (p_S - p_T) / positions``.

    Args:
        student: Its scores.
        teacher: The teacher's; they get no gradient.
        temperature: Dimensionless, > 0.
        kernel: What computes it on an accelerator, compiled; None takes PyTorch's operators one
            by one, as the CPU always does.
    """
    classes = student.shape[-1]
    mean: Tensor = _TemperedKL.apply(
        student.reshape(-1, classes),
        teacher.detach().reshape(-1, classes),
        temperature,
        None if student.device.type == "cpu" else kernel,
    )
    return mean


class DivergenceKernel(nn.Module):
    """A sum of divergences and its gradient in one expression, for ``torch.compile`` to fuse.

    On an accelerator one kernel then reads both models' scores and writes the gradient, without
    the five tensors of that size between. On the CPU, compiled, it takes 1.5 times as long as the
    few rows at a time of :func:`tempered_kl` (171 positions of 50,257 classes): not used there.
    """

    @property
    def is_compiled(self) -> bool:
        """Whether it stands for its compiled form, without which it only takes memory."""
        return "forward" in self.__dict__

    def forward(
        self,
        student: Tensor,  # plain types: the compiler cannot look through a check of shapes
        teacher: Tensor,
        temperature: float,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum over positions, unscaled, and ``scale * (p_S - p_T)``.

        Both models' scores and the second result are [positions, classes].
        """
        log_p = F.log_softmax(at_least_float32(student) / temperature, dim=-1)
        log_q = F.log_softmax(at_least_float32(teacher) / temperature, dim=-1)
        q = log_q.exp()
        gradient = (log_p.exp() - q) * scale
        return torch.sum((log_q - log_p) * q), gradient.to(student.dtype)


class _TemperedKL(torch.autograd.Function):
    """The divergence and its gradient in one pass over a few positions at a time.

    The chain of elementwise operations then works in the processor's cache instead of streaming
    whole [positions, classes] tensors through memory a dozen times, and the only tensor of that
    size it makes is the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        kernel: Callable[..., tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if needs_gradient else None
        positions = len(student)
        total = student.new_zeros((), dtype=at_least_float32(student[:0]).dtype)
        size = max(1, _ELEMENTS_AT_ONCE[student.device.type == "cpu"] // student.shape[-1])
        for start in range(0, positions, size):
            rows = slice(start, start + size)
            if kernel is not None:
                divergence, part = kernel(
                    student[rows], teacher[rows], temperature, temperature / positions
                )
                total += divergence
                if gradient is not None:
                    gradient[rows] = part
                continue
            log_p = F.log_softmax(at_least_float32(student[rows]) / temperature, dim=-1)
            log_q = F.log_softmax(at_least_float32(teacher[rows]) / temperature, dim=-1)
            q = log_q.exp()
            total += torch.sum(log_q.sub_(log_p).mul_(q))
            if gradient is not None:
                same = gradient.dtype == log_p.dtype
                into = gradient[rows] if same else log_q
                torch.sub(log_p.exp_(), q, out=into).mul_(temperature / positions)
                if not same:
                    gradient[rows] = into
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total * (temperature**2 / positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        if outer.device.type == "cpu" and outer.item() == 1:  # elsewhere, asking would wait
            return gradient, None, None, None
        return gradient * outer.to(gradient.dtype), None, None, None


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
