"""How well a prediction of hidden states fits, summed up batch by batch."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cleangpt.runtime.ranks import Ranks


@dataclass
class FitStatistics:
    """Streaming sums for the relative error ``SSE / SS about the mean`` of a prediction.

    Kept on the device of the states: reading them would make an accelerator wait.
    """

    count: int = 0
    squared_error: Tensor | float = 0.0
    squared_norm: Tensor | float = 0.0
    total: Tensor | float = 0.0

    @torch.no_grad()
    def add(
        self, predicted: Float[Tensor, "positions dim"], target: Float[Tensor, "positions dim"]
    ) -> None:
        """Count one batch of predictions."""
        self.count += target.shape[0]
        target = target.float()
        # Sums over batches are float64 where the device has it.
        wide = torch.float32 if target.device.type == "mps" else torch.float64
        self.squared_error += torch.linalg.vector_norm(predicted.float() - target).to(wide).square()
        self.squared_norm += torch.linalg.vector_norm(target).to(wide).square()
        self.total += target.sum(0).to(wide)

    def summed(self, ranks: Ranks) -> "FitStatistics":
        """The sums over all processes of the run."""
        if ranks.count == 1:
            return self
        own = [self.squared_error, self.squared_norm, self.total]
        sums = [torch.as_tensor(value).clone() for value in own]
        count = torch.tensor(float(self.count), device=sums[0].device, dtype=sums[0].dtype)
        ranks.sum([count, *sums])
        return FitStatistics(int(count), *sums)

    def tensors(self) -> dict[str, Tensor]:
        """The sums, to be saved."""
        sums = {"squared_error": self.squared_error, "squared_norm": self.squared_norm}
        count = torch.tensor(self.count)
        return {"count": count, "total": as_sum(self.total)} | {
            name: as_sum(value) for name, value in sums.items()
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "FitStatistics":
        """What :meth:`tensors` returned, as it was."""
        sums = {name: tensor for name, tensor in tensors.items() if name != "count"}
        return cls(int(tensors["count"]), **sums)

    def relative_error(self) -> float:
        """The squared error as a share of the target's variation about its mean."""
        if self.count == 0:
            return float("nan")
        about_mean = torch.as_tensor(self.total).square().sum() / self.count
        variation = float(self.squared_norm - about_mean)
        return float(self.squared_error) / variation if variation > 0 else float("nan")


def as_sum(value: Tensor | float) -> Tensor:
    """A sum that may still be a number, as a tensor."""
    return torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
