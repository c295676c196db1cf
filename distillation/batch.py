"""What a training batch is, and what a user's DataLoader may yield."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cleangpt.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Token ids and their mask on the training device.

    Args:
        input_ids: Token ids, shape [batch, seq].
        attention_mask: True at valid positions, shape [batch, seq].
    """

    input_ids: Tensor
    attention_mask: Tensor

    def count(self) -> int:
        """The number of valid positions."""
        return int(self.attention_mask.sum())

    def valid(self, values: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "positions dim"]:
        """Select the valid positions."""
        return values[self.attention_mask]

    def without_first(self, count: int) -> "Batch":
        """The same tokens, with the first ``count`` valid positions of each row left out."""
        if count == 0:
            return self
        late = self.attention_mask.long().cumsum(-1) > count
        return Batch(self.input_ids, self.attention_mask & late)


def as_batch(raw: Any, device: torch.device) -> Batch:
    """Read what a DataLoader yields: a mapping with ``input_ids``, a tensor, or several tensors.

    Args:
        raw: The batch. Without an ``attention_mask`` every position is valid.
        device: Where the batch goes.

    Raises:
        InputError: If there are no token ids of shape [batch, seq] in it.
    """
    if isinstance(raw, Mapping):
        input_ids, mask = raw.get("input_ids"), raw.get("attention_mask")
    elif isinstance(raw, (list, tuple)) and raw:
        input_ids, mask = raw[0], raw[1] if len(raw) > 1 else None
    else:
        input_ids, mask = raw, None
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise InputError(
            f"The train_dataloader yielded a {type(raw).__name__} without token ids [batch, seq].",
            'Let it yield {"input_ids", "attention_mask"}, as DistillationDataCollator does.',
        )
    if mask is None:
        mask = torch.ones_like(input_ids)
    return Batch(input_ids.to(device, non_blocking=True), mask.to(device, non_blocking=True).bool())
