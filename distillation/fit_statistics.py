"""How well a prediction of hidden states fits, summed up batch by batch."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cleangpt.runtime.ranks import Ranks


@dataclass
class FitStatistics:
    """Streaming sums for the relative error ``SSE / SS about the mean`` of a prediction.

    Kept on the device of the states: reading them would make an accelerator wait. A batch with a
    number that is not finite, whose step is skipped, does not count.
    """

    count: Tensor
    squared_error: Tensor
    squared_norm: Tensor
    total: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device) -> "FitStatistics":
        """Nothing counted yet, of states of this width."""
        # Sums over batches are float64 where the device has it.
        wide = torch.float32 if device.type == "mps" else torch.float64
        zeros = torch.zeros(width, dtype=wide, device=device)
        return cls(zeros.sum(), zeros.sum(), zeros.sum(), zeros)

    @torch.no_grad()
    def add(
        self, predicted: Float[Tensor, "positions dim"], target: Float[Tensor, "positions dim"]
    ) -> None:
        """Count one batch of predictions."""
        target = target.float()
        wide = self.total.dtype
        error = torch.linalg.vector_norm(predicted.float() - target).to(wide).square()
        norm = torch.linalg.vector_norm(target).to(wide).square()
        counts = torch.isfinite(error + norm)
        nothing = torch.zeros_like(error)
        self.count = self.count + counts * target.shape[0]
        self.squared_error = self.squared_error + torch.where(counts, error, nothing)
        self.squared_norm = self.squared_norm + torch.where(counts, norm, nothing)
        self.total = self.total + torch.where(counts, target.sum(0).to(wide), nothing)

    def summed(self, ranks: Ranks) -> "FitStatistics":
        """The sums over all processes of the run."""
        if ranks.count == 1:
            return self
        own = (self.count, self.squared_error, self.squared_norm, self.total)
        sums = [value.clone() for value in own]
        ranks.sum(sums)
        return FitStatistics(*sums)

    def tensors(self, ranks: Ranks) -> dict[str, Tensor]:
        """The sums of every process, to be saved."""
        own = {
            "count": self.count,
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
        return cls(**own)

    def relative_error(self) -> float:
        """The squared error as a share of the target's variation about its mean."""
        if not self.count:
            return float("nan")
        about_mean = self.total.square().sum() / self.count
        variation = float(self.squared_norm - about_mean)
        return float(self.squared_error) / variation if variation > 0 else float("nan")
