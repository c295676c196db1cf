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

    count: int
    squared_error: Tensor
    squared_norm: Tensor
    total: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device) -> "FitStatistics":
        """Nothing counted yet, of states of this width."""
        # Sums over batches are float64 where the device has it.
        wide = torch.float32 if device.type == "mps" else torch.float64
        zeros = torch.zeros(width, dtype=wide, device=device)
        return cls(0, zeros.sum(), zeros.sum(), zeros)

    @torch.no_grad()
    def add(
        self, predicted: Float[Tensor, "positions dim"], target: Float[Tensor, "positions dim"]
    ) -> None:
        """Count one batch of predictions."""
        self.count += target.shape[0]
        target = target.float()
        wide = self.total.dtype
        error = torch.linalg.vector_norm(predicted.float() - target).to(wide).square()
        self.squared_error = self.squared_error + error
        norm = torch.linalg.vector_norm(target).to(wide).square()
        self.squared_norm = self.squared_norm + norm
        self.total = self.total + target.sum(0).to(wide)

    def summed(self, ranks: Ranks) -> "FitStatistics":
        """The sums over all processes of the run."""
        if ranks.count == 1:
            return self
        sums = [value.clone() for value in (self.squared_error, self.squared_norm, self.total)]
        count = torch.tensor(float(self.count), device=sums[0].device, dtype=sums[0].dtype)
        ranks.sum([count, *sums])
        return FitStatistics(int(count), *sums)

    def tensors(self, ranks: Ranks) -> dict[str, Tensor]:
        """The sums of every process, to be saved."""
        own = {
            "count": torch.tensor(self.count, device=self.total.device),
            "squared_error": self.squared_error,
            "squared_norm": self.squared_norm,
            "total": self.total,
        }
        return {name: ranks.gather(tensor) for name, tensor in own.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], ranks: Ranks) -> "FitStatistics":
        """This process's sums among what :meth:`tensors` returned.

        Of another number of processes, the first one gets the sums over all, and the others none.
        """
        if len(tensors["count"]) == ranks.count:
            own = {name: tensor[ranks.index] for name, tensor in tensors.items()}
        else:
            own = {name: ranks.is_main * tensor.sum(0) for name, tensor in tensors.items()}
        return cls(int(own.pop("count")), **own)

    def relative_error(self) -> float:
        """The squared error as a share of the target's variation about its mean."""
        if self.count == 0:
            return float("nan")
        about_mean = self.total.square().sum() / self.count
        variation = float(self.squared_norm - about_mean)
        return float(self.squared_error) / variation if variation > 0 else float("nan")
