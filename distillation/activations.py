"""Where a stage's inputs and targets come from: the rolling activation store.

For every window the store keeps two states: what enters the student block in training, and the raw
output of its teacher block. When the next block asks, a window's states move on from where they
are, by the blocks in between. So the whole backbone costs one teacher forward and one
frozen-student forward over the data, however many blocks and epochs there are, and memory holds one
level, not all of them. Heads never run for it.

Windows are found by their tokens, so any loader, in any order, works; a window never seen, or one
that no longer fits into memory, is computed from its tokens. Only what is frozen may be kept.
"""

import hashlib
import sys

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from cleangpt.blocks import BlockStack, HiddenStates, State
from distillation.batch import Batch


def cache_budget(activation_cache: str, device: torch.device) -> int:
    """The bytes that "auto", "ram" or "off" stands for on this machine now."""
    if activation_cache == "auto":
        if device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[0]) // 2
        return int(psutil.virtual_memory().available) // 2
    return 0 if activation_cache == "off" else sys.maxsize


class Activations:
    """Frozen states of both models, from memory where they are known.

    Args:
        teacher: The model whose hidden states are learnt.
        student: The model that learns.
        budget_bytes: Memory the kept states may take; 0 keeps none, and both models run up to the
            block in training for every batch.
    """

    def __init__(self, teacher: BlockStack, student: BlockStack, budget_bytes: int) -> None:
        self.teacher = teacher
        self.student = student
        self._budget = _Budget(budget_bytes)
        self._teacher_states = _RollingStates(teacher, self._budget)
        self._student_states = _RollingStates(student, self._budget)

    @property
    def bytes_kept(self) -> int:
        """Memory taken by kept states."""
        return self._budget.used

    @torch.no_grad()
    def teacher_output(self, block: int, batch: Batch) -> HiddenStates:
        """The raw output of a teacher block."""
        return self.teacher.hidden(self._teacher_states.entering(block + 1, batch))

    @torch.no_grad()
    def student_input(self, block: int, batch: Batch) -> State:
        """What enters a student block; the blocks before it must be frozen.

        ``block == num_blocks`` is the last block's raw output.
        """
        return self._student_states.entering(block, batch)

    @torch.no_grad()
    def teacher_logits(self, batch: Batch) -> Float[Tensor, "batch seq vocab"]:
        """The teacher's own logits; only its final norm and head run if its last state is known."""
        state = self._teacher_states.entering(self.teacher.num_blocks, batch)
        return self.teacher.logits_of(state, batch.input_ids, batch.attention_mask.long())

    def forget(self) -> None:
        """Drop all states; needed before a student whose frozen parts have changed is read."""
        self._teacher_states.clear()
        self._student_states.clear()


class _Budget:
    """Counts bytes against a limit shared by both models' states."""

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


class _RollingStates:
    """One state per window: what enters a block whose index only grows."""

    def __init__(self, stack: BlockStack, budget: _Budget) -> None:
        self._stack = stack
        self._budget = budget
        self._rows: dict[bytes, tuple[int, Tensor]] = {}

    def clear(self) -> None:
        """Forget all windows."""
        self._budget.give_back(sum(state.nbytes for _, state in self._rows.values()))
        self._rows.clear()

    def entering(self, index: int, batch: Batch) -> Tensor:
        """What enters block ``index``, shape [batch, seq, d_state]."""
        ids, mask = batch.input_ids, batch.attention_mask.long()
        if self._budget.limit == 0:
            return self._stack.state_entering(index, ids, mask)
        keys = _row_keys(batch)
        known = [self._rows.get(key) for key in keys]
        rows = [row for row in known if row is not None]
        levels = {level for level, _ in rows}
        if len(rows) < len(keys) or len(levels) > 1 or max(levels) > index:
            state = self._stack.state_entering(index, ids, mask)
            self._keep(keys, index, state, batch)
            return state
        (level,) = levels
        state = _assembled([row for _, row in rows], batch)
        if level == index:
            return state
        for block in range(level, index):
            state = self._stack.advance(block, state, ids, mask)
        self._keep(keys, index, state, batch)
        return state

    def _keep(self, keys: list[bytes], level: int, state: Tensor, batch: Batch) -> None:
        """Remember the valid positions of each row, as far as memory allows."""
        whole = bool(batch.attention_mask.all())
        for row, key in enumerate(keys):
            old = self._rows.pop(key, None)
            if old is not None:
                self._budget.give_back(old[1].nbytes)
            kept = state[row] if whole else state[row][batch.attention_mask[row]]
            if self._budget.take(kept.nbytes):
                # A view would keep the whole batch alive after its other rows have moved on.
                self._rows[key] = (level, kept.clone())


def _row_keys(batch: Batch) -> list[bytes]:
    """A key per row: a hash of its valid token ids, so padding does not matter."""
    ids, masks = batch.input_ids.cpu(), batch.attention_mask.cpu()
    return [
        hashlib.blake2b(row[mask].numpy().tobytes(), digest_size=16).digest()
        for row, mask in zip(ids, masks, strict=True)
    ]


def _assembled(rows: list[Tensor], batch: Batch) -> Tensor:
    """Put rows of valid positions back into a padded batch; padding is zero."""
    batch_size, seq_len = batch.input_ids.shape
    if all(row.shape[0] == seq_len for row in rows):
        return torch.stack(rows)
    state = rows[0].new_zeros(batch_size, seq_len, rows[0].shape[-1])
    for into, row, mask in zip(state, rows, batch.attention_mask, strict=True):
        into[mask] = row
    return state
