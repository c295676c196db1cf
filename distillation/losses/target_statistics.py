"""Targets on which one loss fits every level of a real residual stream.

The states of a pretrained model grow with depth, and a few of their channels hold values thousands
of times larger than the rest, mostly at a window's first position (Sun et al. 2024,
arXiv:2402.17762). Normalising each token, and then each channel, keeps both out of a squared error.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from distillation.losses.divergence import at_least_float32

_TOKEN_EPS = 1e-5
"""Share of a token's mean square that is added to its variance."""

_STD_FLOOR_QUANTILE = 0.05
_LEAST_STD = 1e-6
"""Of token-normalised states, whose mean square is 1: smaller spreads are rounding."""

_WHITENING_POWER = 0.5
"""0 leaves the variances of the directions as they are, 1 makes them equal, noise included."""

_EIGENVALUE_FLOOR = 1e-3
"""Share of the mean eigenvalue that is added to each before whitening."""


def token_normalised(
    states: Float[Tensor, "*positions d"], like: Float[Tensor, "*positions d"] | None = None
) -> Float[Tensor, "*positions d"]:
    """Layer normalisation of each token, without gain and bias, in float32 or wider.

    ``(h - mean(h)) / sqrt(var(h) + 1e-5 mean(h^2))`` over channels (Ba et al. 2016,
    arXiv:1607.06450, eq. 3). As the epsilon is a share of the token's own energy, the scale of the
    states does not matter at all. A token of zeros stays one.

    Args:
        states: What is normalised.
        like: The states whose means and variances are used instead of their own: ``states`` then
            keep their errors of place and size against these.
    """
    states = at_least_float32(states)
    measured = states if like is None else at_least_float32(like)
    mean = measured.mean(-1, keepdim=True)
    energy = measured.square().mean(-1, keepdim=True)
    variance = (measured - mean).square().mean(-1, keepdim=True) + _TOKEN_EPS * energy
    return (states - mean) / variance.clamp(min=torch.finfo(states.dtype).tiny).sqrt()


@dataclass(frozen=True, eq=False)
class TargetStatistics:
    """Mean and spread per channel of a level's token-normalised teacher states.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel, > 0, none below the 5th percentile of all: channels
            that hardly vary would else be noise blown up.
        covariance: Covariance of the channels.
    """

    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]

    @classmethod
    def of(cls, states: Float[Tensor, "*positions d"]) -> "TargetStatistics":
        """Measure one batch of raw teacher states."""
        normalised = token_normalised(states.detach()).flatten(0, -2)
        mean = normalised.mean(0)
        centred = normalised - mean
        with torch.autocast(states.device.type, enabled=False):
            return cls.from_moments(mean, centred.T @ centred / len(centred))

    @classmethod
    def from_moments(
        cls, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]
    ) -> "TargetStatistics":
        """Take mean and covariance of token-normalised states; all is kept in float32."""
        std = covariance.diagonal().clamp(min=0).sqrt()
        floor = torch.quantile(std, _STD_FLOOR_QUANTILE).clamp(min=_LEAST_STD)
        return cls(mean.float(), std.maximum(floor).float(), covariance.float())

    def to(self, device: torch.device | str) -> "TargetStatistics":
        """The same statistics on a device."""
        tensors = (self.mean, self.std, self.covariance)
        return TargetStatistics(*(tensor.to(device) for tensor in tensors))

    def standardised(
        self,
        states: Float[Tensor, "*positions d"],
        like: Float[Tensor, "*positions d"] | None = None,
    ) -> Float[Tensor, "*positions d"]:
        """Raw teacher states, token-normalised, with mean 0 and spread 1 (at most) per channel."""
        return (token_normalised(states, like) - self.mean) / self.std

    def whitened(
        self,
        states: Float[Tensor, "*positions d"],
        like: Float[Tensor, "*positions d"] | None = None,
    ) -> Float[Tensor, "*positions d"]:
        """Raw teacher states, token-normalised, with flattened variances along eigenvectors.

        ``(t - mean) E diag((lambda + floor)^(-1/4)) E^T`` with ``E`` and ``lambda`` the eigenbasis
        of the covariance: halfway between the states and their full whitening, which would weigh
        noise like signal. Rotated back, so that channels keep their names.
        """
        centred = token_normalised(states, like) - self.mean
        with torch.autocast(states.device.type, enabled=False):
            return centred @ self._whitening.to(centred.dtype)

    @property
    def unwhitening(self) -> Float[Tensor, "d d"]:
        """The inverse of what :meth:`whitened` multiplies by."""
        return torch.linalg.inv(self._whitening.double()).to(self.covariance)

    @cached_property
    def standardised_variance(self) -> Float[Tensor, ""]:
        """Variance of the standardised states: 1 but for channels whose spread was floored."""
        return _one_if_zero(self._channel_variances.mean())

    @cached_property
    def whitened_variance(self) -> Float[Tensor, ""]:
        """Variance of the whitened states, averaged over channels."""
        whitening = self._whitening
        with torch.autocast(whitening.device.type, enabled=False):
            variances = (whitening @ self.covariance * whitening).sum(0)
        return _one_if_zero(variances.mean())

    @cached_property
    def standardised_huber(self) -> Float[Tensor, ""]:
        """Expected Huber loss of predicting 0 for normal states with the standardised variances.

        The states' true distribution is not known from two moments. For ``x ~ N(0, s^2)`` and
        ``a = 1 / s`` the expectation of the Huber loss with threshold 1 is
        ``s^2 (erf(a / sqrt 2) / 2 - a phi(a)) + 2 s phi(a) - erfc(a / sqrt 2) / 2``
        with ``phi`` the normal density: 0.42 for s = 1.
        """
        s = self._channel_variances.clamp(min=_LEAST_STD**2).sqrt()
        a = 1 / s
        density = torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
        inside = s.square() * (torch.erf(a / math.sqrt(2)) / 2 - a * density)
        outside = 2 * s * density - torch.erfc(a / math.sqrt(2)) / 2
        return (inside + outside).mean()

    @cached_property
    def _channel_variances(self) -> Float[Tensor, " d"]:
        return self.covariance.diagonal() / self.std.square()

    @cached_property
    def _whitening(self) -> Float[Tensor, "d d"]:
        # On the CPU, as not every accelerator has float64.
        values, vectors = torch.linalg.eigh(self.covariance.cpu().double())
        values = values.clamp(min=0)
        floor = (_EIGENVALUE_FLOOR * values.mean()).clamp(min=_LEAST_STD**2)
        scales = (values + floor) ** (-_WHITENING_POWER / 2)
        return (vectors * scales @ vectors.T).to(self.covariance)


def _one_if_zero(variance: Tensor) -> Tensor:
    """What to divide by: states that do not vary have a target of zeros, whatever its unit."""
    return torch.where(variance > 0, variance, torch.ones_like(variance))
