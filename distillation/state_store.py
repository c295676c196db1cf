"""Where the rows of the rolling activation store lie: in memory, or in a file of the run.

A row is the state of one window at one level, [positions, d_state], found by a key of 16 bytes.
Both stores keep one level per key: writing again takes the place of what was there, so a store does
not grow with levels. What is computed, and when, is not known here; read ``activations`` for that.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from distillation.batch import Batch

KeptState = Float[Tensor, "positions d_state"]


class Row(NamedTuple):
    """What is known of a kept state.

    Args:
        level: Index of the block it enters.
        shape: Positions and width.
        dtype: What it was computed in; it may be kept in a narrower one.
    """

    level: int
    shape: tuple[int, int]
    dtype: torch.dtype


class Budget:
    """Counts bytes against a limit shared by the stores of both models."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, size: int) -> bool:
        """Reserve ``size`` bytes if there is room."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        """Return reserved bytes."""
        self.used -= size


class StateStore(ABC):
    """Rows by key, within a budget.

    Args:
        budget: Where the bytes are counted.
        dtype: The widest dtype states are kept in.

    Attributes:
        rows: What is there.
        weights: By level, a checksum of the weights that states of that level were computed with.
        device: Where :meth:`read` and :meth:`write` want tensors; None is where the models are.
    """

    device: torch.device | None = None

    def __init__(self, budget: Budget, dtype: torch.dtype = torch.float32) -> None:
        self.budget = budget
        self.dtype = dtype
        self.rows: dict[bytes, Row] = {}
        self.weights: dict[int, str] = {}

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What states of ``dtype`` are kept in: never wider than they are."""
        return self.dtype if self.dtype.itemsize < dtype.itemsize else dtype

    def read_batch(self, first: Row, keys: list[bytes], batch: Batch) -> Tensor | None:
        """Kept rows as a batch, zero at padding; None if one of them turns out to be damaged."""
        batch_size, seq_len = batch.input_ids.shape
        make = torch.empty if batch.is_full else torch.zeros
        state = make(
            (batch_size, seq_len, first.shape[1]),
            dtype=self.kept_dtype(first.dtype),
            device=self.device or batch.input_ids.device,
        )
        for key, into, mask in zip(keys, state, batch.host_mask, strict=True):
            positions = self.rows[key].shape[0]
            valid = into if positions == seq_len else into.new_empty(positions, into.shape[1])
            if not self.read(key, valid):
                return None
            if valid is not into:
                into[mask] = valid
        return state.to(batch.input_ids.device, first.dtype)

    def write_batch(self, keys: list[bytes], level: int, state: Tensor, batch: Batch) -> None:
        """Remember the valid positions of each row, as far as there is room."""
        kept = state.to(self.device or state.device, self.kept_dtype(state.dtype))
        for key, rows, mask in zip(keys, kept, batch.host_mask, strict=True):
            valid = rows if batch.is_full else rows[mask]
            positions, width = valid.shape
            if not positions:  # a row of padding only: there is nothing to keep
                continue
            self.write(key, Row(level, (positions, width), state.dtype), valid)

    @abstractmethod
    def read(self, key: bytes, into: KeptState) -> bool:
        """Copy a known row into a contiguous tensor of its kept dtype; False if it is damaged."""

    @abstractmethod
    def write(self, key: bytes, row: Row, state: KeptState) -> None:
        """Keep a state, given in its kept dtype, if there is room; else forget the key."""

    @abstractmethod
    def drop(self, key: bytes) -> None:
        """Forget one row."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all rows and give their bytes back."""

    @abstractmethod
    def finish(self, *, keep: bool) -> None:
        """End the use of the store; ``keep`` leaves behind what can be opened again."""

    def drop_stale(self, weights: Sequence[str]) -> None:
        """Forget rows that were computed with other weights than ``weights``, one per level."""
        known = self.weights
        stale = {level for level, name in enumerate(weights) if known.get(level, name) != name}
        for key in [key for key, row in self.rows.items() if row.level in stale]:
            self.drop(key)
        self.weights = dict(enumerate(weights))


class RamStore(StateStore):
    """Rows in the memory of the device the models are on."""

    def __init__(self, budget: Budget, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(budget, dtype)
        self._states: dict[bytes, Tensor] = {}

    def read(self, key: bytes, into: KeptState) -> bool:
        """Copy a known row; memory is taken to be sound."""
        into.copy_(self._states[key])
        return True

    def write(self, key: bytes, row: Row, state: KeptState) -> None:
        """Keep a copy: a view would keep its whole batch alive."""
        old = self._states.get(key)
        if old is not None and old.shape == state.shape and old.dtype == state.dtype:
            old.copy_(state)
        else:
            self.drop(key)
            if not self.budget.take(state.nbytes):
                return
            self._states[key] = state.clone()
        self.rows[key] = row

    def drop(self, key: bytes) -> None:
        """Forget one row."""
        old = self._states.pop(key, None)
        if old is not None:
            self.budget.give_back(old.nbytes)
            del self.rows[key]

    def clear(self) -> None:
        """Forget all rows."""
        for key in list(self.rows):
            self.drop(key)

    def finish(self, *, keep: bool) -> None:
        """Forget all rows: memory cannot be kept."""
        self.clear()
