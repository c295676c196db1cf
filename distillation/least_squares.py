"""Linear regression from streaming sums."""

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-6
"""Ridge term as a share of each input channel's variance: it only makes the solution exist."""

_ROUNDING = 1e-12
"""Share of a channel's energy below which its variance is the rounding of its mean."""


class LeastSquares:
    """The ridge regression ``y ~ B x + c`` over positions that come in batches.

    Only sums are kept, d_in (d_in + d_out) numbers in float64, so one pass over the data serves any
    number of regressions. The intercept is not shrunk, and the ridge is that of standardised inputs
    (Hoerl & Kennard 1970, section 3): pretrained models have channels a thousand times larger than
    the others (Sun et al. 2024, arXiv:2402.17762), and a ridge set by those would drown the rest.
    """

    def __init__(self) -> None:
        self.count = 0
        self._xx: Tensor | None = None
        self._xy: Tensor | None = None

    def add(self, x: Float[Tensor, "positions d_in"], y: Float[Tensor, "positions d_out"]) -> None:
        """Count positions.

        Args:
            x: What is predicted from.
            y: What is predicted.
        """
        x, y = x.cpu().double(), y.cpu().double()  # not every accelerator has float64
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        xx, xy = x.T @ x, x.T @ y
        self._xx = xx if self._xx is None else self._xx + xx
        self._xy = xy if self._xy is None else self._xy + xy
        self.count += x.shape[0]

    def regression(
        self, ridge: float = RIDGE
    ) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"]]:
        """Return ``B`` and ``c``, in float64.

        Args:
            ridge: Ridge term as a share of each input channel's variance.

        Raises:
            ValueError: If no position was counted.
        """
        mean, second_moment = self.input_moments()
        assert self._xy is not None
        xy = self._xy / self.count
        target_mean = xy[-1]
        covariance = second_moment - torch.outer(mean, mean)
        covariance += torch.diag(_ROUNDING * second_moment.diagonal())
        spread = covariance.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()[:, None]
        correlation = covariance / spread / spread.T
        firm = correlation + ridge * torch.eye(len(correlation), dtype=correlation.dtype)
        cross = (xy[:-1] - torch.outer(mean, target_mean)) / spread
        # Once more through the ridge: what lies along directions without variance (a LayerNorm's
        # features sum to zero) is rounding, which the ridge alone would divide by next to nothing.
        factors = torch.linalg.lu_factor(firm)
        weight = torch.linalg.lu_solve(*factors, cross)
        weight = torch.linalg.lu_solve(*factors, correlation @ weight)
        weight = (weight / spread).T
        return weight, target_mean - weight @ mean

    def input_moments(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
        """Return ``E[x]`` and ``E[x x^T]`` over the positions counted, in float64.

        Raises:
            ValueError: If no position was counted.
        """
        if self._xx is None or self.count == 0:
            raise ValueError("A regression needs at least one valid position.")
        moments = self._xx / self.count
        return moments[:-1, -1], moments[:-1, :-1]
