"""States of all windows that move on block by block, as the stages ask for them.

``RollingStates`` is one model's; ``StatesInStep`` is that of a teacher whose blocks are spread over
the processes of a run. Where rows lie is in ``state_store``, who asks for them in ``activations``.
"""

from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from cleangpt.blocks import BlockStack
from cleangpt.runtime.faultpoints import faultpoint
from cleangpt.runtime.module_state import tensors_checksum
from cleangpt.sharding import ShardedBlocks
from distillation.batch import Batch, rows_of
from distillation.state_store import StateStore

_POSITIONS_AT_ONCE = 512


class RollingStates:
    """One state per window: what enters a block whose index only grows."""

    def __init__(self, stack: BlockStack, store: StateStore, *, learns: bool) -> None:
        self._stack = stack
        self.store = store
        self._learns = learns
        self._index: int | None = None

    def clear(self) -> None:
        """Forget all windows."""
        self.store.clear()

    def finish(self, *, keep: bool) -> None:
        """End the use of the store, and leave behind what can be used again if that is asked."""
        if keep:
            self._drop_stale()
        self.store.finish(keep=keep)

    def entering(self, index: int, batch: Batch) -> Tensor:
        """What enters block ``index``, shape [batch, seq, d_state]."""
        if self.store.budget.limit == 0:
            return self._computed(index, batch, None)
        if index != self._index:
            self._drop_stale()
            self._index = index
        keys = batch.row_keys
        groups: dict[tuple[int, torch.dtype] | None, list[int]] = {}
        for position, key in enumerate(keys):
            row = self.store.rows.get(key)
            known = None if row is None else (row.level, row.dtype)
            groups.setdefault(known, []).append(position)
        if len(groups) == 1:
            return self._entering(index, keys, batch)
        parts = {
            tuple(group): self._entering(index, [keys[i] for i in group], rows_of(batch, group))
            for group in groups.values()
        }
        first = next(iter(parts.values()))
        state = first.new_empty(len(keys), *first.shape[1:])
        for group, part in parts.items():
            state[list(group)] = part.to(state.dtype)
        return state

    def _drop_stale(self) -> None:
        """Forget states from before blocks learnt on; asked between two levels, it is cheap."""
        if self._learns:
            self.store.drop_stale(level_weights(self._stack))

    def _entering(self, index: int, keys: list[bytes], batch: Batch) -> Tensor:
        """The same for windows that are all unknown, or all known at one level."""
        row = self.store.rows.get(keys[0])
        state = None
        if row is not None and row.level <= index:
            state = self.store.read_batch(row, keys, batch)
        if row is not None and state is not None and row.level == index:
            return state
        known = None if row is None or state is None else (row.level, state)
        state = self._computed(index, batch, known)
        faultpoint("store.computed")
        self.store.write_batch(keys, index, state, batch)
        faultpoint("store.kept")
        return state

    def _computed(self, index: int, batch: Batch, known: tuple[int, Tensor] | None) -> Tensor:
        """Run the blocks from what is known, or from the tokens, some windows at a time.

        What a block makes on its way is several times its output, and the peak of a stage's memory
        if a whole batch passes at once. On an accelerator time counts more.
        """
        windows, seq_len = batch.input_ids.shape
        on_cpu = batch.input_ids.device.type == "cpu"
        size = max(1, _POSITIONS_AT_ONCE // max(1, seq_len)) if on_cpu else windows
        if size >= windows:
            return self._run(index, batch, known)
        whole: Tensor | None = None
        for start in range(0, windows, size):
            rows = list(range(start, min(start + size, windows)))
            entering = None if known is None else (known[0], known[1][rows])
            part = self._run(index, rows_of(batch, rows), entering)
            if whole is None:
                whole = part.new_empty(windows, *part.shape[1:])
            whole[rows] = part
        assert whole is not None
        return whole

    def _run(self, index: int, batch: Batch, known: tuple[int, Tensor] | None) -> Tensor:
        if known is None:
            return self._stack.state_entering(index, batch.input_ids, batch.mask)
        level, state = known
        for block in range(level, index):
            state = self._stack.advance(block, state, batch.input_ids, batch.mask)
        return state


@dataclass
class _Part:
    """Some windows of a batch whose states are at one level; -1 is their tokens."""

    rows: list[int]
    batch: Batch
    level: int
    state: Tensor | None = None


class StatesInStep(RollingStates):
    """The same for a teacher whose blocks are spread over the processes of a run.

    A block runs only where all processes take part in gathering it. So they agree on the lowest
    block that any of them needs, and go through all blocks from there on in step, each with the
    windows that it has at that level; a process that has none only takes part.
    """

    def __init__(self, stack: BlockStack, store: StateStore, shards: ShardedBlocks) -> None:
        super().__init__(stack, store, learns=False)
        self._shards = shards
        stack.returns_tuples()  # runs a block, which all processes must do together

    def entering(self, index: int, batch: Batch) -> Tensor:
        """What enters block ``index``, shape [batch, seq, d_state]; called by all processes."""
        parts = self._parts(index, batch)
        lowest = self._shards.lowest(min((part.level for part in parts), default=index))
        begun = [part for part in parts if part.level < index]
        for block in range(max(0, lowest), index):
            ready = [part for part in begun if part.level <= block]
            for part in ready:
                known = None if part.state is None else (block, part.state)
                part.state = self._computed(block + 1, part.batch, known)
                part.level = block + 1
            if not ready:
                self._shards.touch(block)
        for part in begun:
            keys = [batch.row_keys[row] for row in part.rows]
            assert part.state is not None
            self.store.write_batch(keys, index, part.state, part.batch)
        return _put_together(parts, batch)

    def _parts(self, index: int, batch: Batch) -> list[_Part]:
        """The batch's windows by what is kept of them."""
        groups: dict[tuple[int, torch.dtype] | None, list[int]] = {}
        for position, key in enumerate(batch.row_keys):
            row = self.store.rows.get(key)
            known = None if row is None or row.level > index else (row.level, row.dtype)
            groups.setdefault(known, []).append(position)
        parts = []
        for group, rows in groups.items():
            part = _Part(rows, rows_of(batch, rows), -1)
            if group is not None:
                keys = [batch.row_keys[row] for row in rows]
                part.state = self.store.read_batch(self.store.rows[keys[0]], keys, part.batch)
                part.level = -1 if part.state is None else group[0]
            parts.append(part)
        return parts


def _put_together(parts: list[_Part], batch: Batch) -> Tensor:
    states = [part.state for part in parts if part.state is not None]
    if not states:  # a share without windows; nobody looks at its states
        return batch.input_ids.new_empty((*batch.input_ids.shape, 1), dtype=torch.float32)
    whole = states[0].new_empty(len(batch.row_keys), *states[0].shape[1:])
    for part, state in zip(parts, states, strict=True):
        whole[part.rows] = state.to(whole.dtype)
    return whole


def level_weights(stack: BlockStack) -> list[str]:
    """A checksum per level of all tensors that a state entering that block depends on.

    Entry 0 is of the embeddings and entry ``num_blocks`` of the whole backbone. The final norm and
    the head are in none: the head phase changes them and no state.
    """
    blocks = [stack.block(i) for i in range(stack.num_blocks)]
    others = {id(module) for module in (*blocks, stack.final_norm, stack.lm_head)}
    prefixes = tuple(
        f"{name}." for name, module in stack.model.named_modules() if id(module) in others
    )
    tensors = [(n, t) for n, t in stack.model.state_dict().items() if not n.startswith(prefixes)]
    sums = [tensors_checksum(tensors, stack.model)]
    for block in blocks:
        own = tensors_checksum(block.state_dict().items(), block)
        sums.append(xxhash.xxh3_128_hexdigest((sums[-1] + own).encode()))
    return sums
