"""Losses between (stitched) student hidden states and teacher hidden states."""

import copy
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
from distillation.losses.target_statistics import TargetStatistics


class DistillationLoss(nn.Module):
    """Distance between two sets of hidden states, averaged over positions.

    Two losses compare the states as they are:

    * ``mse``: mean squared error over positions and channels (FitNets, Romero et al. 2015,
      arXiv:1412.6550, eq. 3). Teachers with massive activations rule it by a few channels.
    * ``kl_div``: reads each state as scores, takes the softmax over channels, and returns
      KL(teacher || student) in nats times temperature squared. It is blind to a constant added to a
      state, so prefer another unless you want just that.

    The others compare the student with a target that keeps its size at every level: the teacher's
    states, normalised per token (scale is no information to the next block, which normalises too)
    and then standardised per channel by the level's statistics. Their value is 1 for the best
    constant prediction and 0 for a perfect student:

    * ``nmse``: mean squared error, divided by the target's variance.
    * ``smooth_l1``: Huber loss with threshold 1 (Huber 1964; Girshick 2015, arXiv:1504.08083,
      eq. 3), divided by what the constant prediction would get if the target were normal; so the
      1 is as good as the states are near to normal.
    * ``cosine``: 1 - cos(student, target) per position; the student's length is free.
    * ``whiten``: as ``nmse``, with a target whose variances are flattened along the eigenvectors of
      the states' covariance instead of per channel, so small directions count for more.

    Args:
        loss_type: "mse", "kl_div", "nmse", "cosine", "smooth_l1" or "whiten".
        temperature: Softmax temperature of ``kl_div``, dimensionless, > 0; no other loss uses it.
        statistics: Of the teacher's states at this level, on the device of the states; for the
            losses that standardise. None measures each batch by itself, which will do in a
            notebook: means over batches of unequal statistics do not add up to one over all.

    Raises:
        ValueError: If ``loss_type`` is unknown, ``temperature`` is not positive, or statistics are
            given to a loss that does not standardise.

    Example:
        >>> import torch
        >>> states = torch.randn(5, 8)
        >>> DistillationLoss("mse")(states, states).item()
        0.0
        >>> loss = DistillationLoss("nmse")
        >>> loss(loss.target(states), 100 * states).item() < 1e-9
        True
    """

    LOSS_TYPES: ClassVar[tuple[str, ...]] = (
        "mse",
        "kl_div",
        "nmse",
        "cosine",
        "smooth_l1",
        "whiten",
    )

    def __init__(
        self,
        loss_type: str = "mse",
        temperature: float = 1.0,
        *,
        statistics: TargetStatistics | None = None,
    ) -> None:
        super().__init__()
        check_loss_choice(loss_type, self.LOSS_TYPES, temperature)
        self.loss_type = loss_type
        self.temperature = temperature
        if statistics is not None:
            self._check_takes_statistics()
        self.statistics = statistics
        self.reads_raw_states = False

    @property
    def needs_statistics(self) -> bool:
        """Whether the target is standardised by statistics of the teacher's level."""
        return self.loss_type not in ("mse", "kl_div")

    def at_level(self, statistics: TargetStatistics) -> "DistillationLoss":
        """The same loss with the statistics of one level of the teacher.

        Raises:
            ValueError: If the loss compares raw states.
        """
        self._check_takes_statistics()
        loss = copy.copy(self)  # a subclass stays what it is
        loss.statistics = statistics
        return loss

    def on_raw_states(self) -> "DistillationLoss":
        """The same loss for student states that are to equal the teacher's raw ones, size included.

        The losses that standardise then do so with the student's states as with the teacher's, by
        the teacher's mean and variance of each token: what a state is too large by counts. The
        other losses compare such states anyway.
        """
        loss = copy.copy(self)
        loss.reads_raw_states = True
        return loss

    def forward(
        self,
        student_outputs: Float[Tensor, "..."],
        teacher_outputs: Float[Tensor, "..."],
    ) -> Float[Tensor, ""]:
        """Return the mean over positions; both have shape [positions, dim] (or more leading axes).

        Raises:
            ValueError: If the shapes differ, or are not of the statistics' width.
        """
        check_same_shape(student_outputs, teacher_outputs)
        if self.loss_type == "kl_div":
            return tempered_kl(student_outputs, teacher_outputs, self.temperature)
        student = at_least_float32(student_outputs)
        if self.loss_type == "mse":
            return F.mse_loss(student, at_least_float32(teacher_outputs))
        statistics = self._statistics_for(teacher_outputs)
        target = self._standardised(teacher_outputs, statistics)
        if self.reads_raw_states:
            student = self._standardised(student, statistics, like=teacher_outputs)
        if self.loss_type == "cosine":
            return 1 - F.cosine_similarity(student, target, dim=-1).mean()
        if self.loss_type == "smooth_l1":
            return F.smooth_l1_loss(student, target) / statistics.standardised_huber
        if self.loss_type == "nmse":
            return F.mse_loss(student, target) / statistics.standardised_variance
        return F.mse_loss(student, target) / statistics.whitened_variance

    def target(self, teacher: Float[Tensor, "*positions d"]) -> Float[Tensor, "*positions d"]:
        """What a student is compared with: the teacher's states, standardised if the loss does so.

        Raises:
            ValueError: If the states are not of the statistics' width.
        """
        if not self.needs_statistics:
            return teacher
        return self._standardised(teacher, self._statistics_for(teacher))

    def restored(self) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]] | None:
        """What turns a target back into the token-normalised state: ``M target + m``.

        None for targets that are raw, of unknown statistics, or taught up to their length, and
        where the student's states are raw ones.
        """
        if self.statistics is None or self.loss_type == "cosine" or self.reads_raw_states:
            return None
        if self.loss_type == "whiten":
            return self.statistics.unwhitening, self.statistics.mean
        return self.statistics.std.diag(), self.statistics.mean

    def comparable(
        self, student: Float[Tensor, "*positions d"], teacher: Float[Tensor, "*positions d"]
    ) -> tuple[Float[Tensor, "*positions d"], Float[Tensor, "*positions d"]]:
        """Student and target in one space, in which a relative squared error means something.

        That of ``cosine`` gives each student state the length of its target, as the loss leaves it
        free.
        """
        target = self.target(teacher)
        if self.reads_raw_states and self.needs_statistics:
            student = self._standardised(student, self._statistics_for(teacher), like=teacher)
        if self.loss_type != "cosine":
            return student, target
        lengths = target.norm(dim=-1, keepdim=True)
        return F.normalize(at_least_float32(student), dim=-1) * lengths, target

    def _check_takes_statistics(self) -> None:
        if not self.needs_statistics:
            raise ValueError(
                f"The loss {self.loss_type!r} compares raw states: it takes no statistics."
            )

    def _statistics_for(self, teacher: Tensor) -> TargetStatistics:
        if self.statistics is None:
            return TargetStatistics.of(teacher)
        width = len(self.statistics.mean)
        if teacher.shape[-1] != width:
            raise ValueError(
                f"The states are {teacher.shape[-1]} wide and the statistics {width}:"
                " they are of different teachers."
            )
        return self.statistics

    def _standardised(
        self, states: Tensor, statistics: TargetStatistics, like: Tensor | None = None
    ) -> Tensor:
        """Teacher states as a target; or student states by the teacher's, ``like``."""
        states, like = (states.detach(), None) if like is None else (states, like.detach())
        if self.loss_type == "whiten":
            return statistics.whitened(states, like)
        return statistics.standardised(states, like)
