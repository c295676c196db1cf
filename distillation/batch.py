"""What a training batch is, and what a user's DataLoader may yield."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cleangpt.errors import InputError

MEASURED_AT_ONCE = 4096
"""Positions of which the states of all levels are in memory at once."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids and their mask on the training device.

    Everything about them that Python must know is read from the copies on the host: on an
    accelerator, asking the device would make every step wait for the one before.

    Args:
        input_ids: Token ids, shape [batch, seq].
        attention_mask: True at valid positions, shape [batch, seq].
        host_ids: The token ids on the CPU.
        host_mask: The mask on the CPU.
    """

    input_ids: Tensor
    attention_mask: Tensor
    host_ids: Tensor
    host_mask: Tensor

    @cached_property
    def is_full(self) -> bool:
        """Whether every position is valid."""
        return bool(self.host_mask.all())

    @property
    def mask(self) -> Tensor | None:
        """The mask a model takes, ones and zeros; None without padding: the fastest kernels."""
        return None if self.is_full else self.attention_mask.long()

    @cached_property
    def row_keys(self) -> list[bytes]:
        """A key per row: a hash of its valid token ids, so padding does not matter."""
        return [
            hashlib.blake2b(row[mask].numpy().tobytes(), digest_size=16).digest()
            for row, mask in zip(self.host_ids, self.host_mask, strict=True)
        ]

    @cached_property
    def num_valid(self) -> int:
        """The number of valid positions."""
        return int(self.host_mask.sum())

    def valid(self, values: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "positions dim"]:
        """Select the valid positions; a view where all are."""
        return values.flatten(0, 1) if self.is_full else values[self.attention_mask]

    def without_first(self, count: int) -> "Batch":
        """The same tokens, with the first ``count`` valid positions of each row left out."""
        if count == 0:
            return self
        late = self.host_mask & (self.host_mask.long().cumsum(-1) > count)
        on_device = late.to(self.input_ids.device, non_blocking=True)
        return Batch(self.input_ids, on_device, self.host_ids, late)


def as_batch(raw: Any, device: torch.device) -> Batch:
    """Read what a DataLoader yields: a mapping with ``input_ids``, a tensor, or several tensors.

    Args:
        raw: The batch. Without an ``attention_mask`` every position is valid.
        device: Where the batch goes; copied while the device works if it lies in pinned memory.

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
    return Batch(
        input_ids.to(device, non_blocking=True),
        mask.to(device, non_blocking=True).bool(),
        input_ids.cpu(),
        mask.cpu().bool(),
    )


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch."""
    return Batch(
        batch.input_ids[rows],
        batch.attention_mask[rows],
        batch.host_ids[rows],
        batch.host_mask[rows],
    )


def in_parts(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches cut into parts of ``MEASURED_AT_ONCE`` positions, or one window if that is longer.

    For what looks at all levels of a model at once: those of a large batch fill any device.
    """
    for batch in batches:
        windows, seq_len = batch.input_ids.shape
        size = max(1, MEASURED_AT_ONCE // max(1, seq_len))
        if size >= windows:
            yield batch
            continue
        for start in range(0, windows, size):
            yield rows_of(batch, list(range(start, min(start + size, windows))))
