"""States for blocks that learn together: each block's output is handed on as the next one's input.

One forward pass through the student serves all blocks; nothing flows back from one to another.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cleangpt.blocks import HiddenStates, State
from cleangpt.sharding import sharded_blocks
from distillation.activations import Activations
from distillation.batch import Batch, rows_of
from distillation.state_store import StateStore


class PassingStates(Activations):
    """What the blocks of one pass give each other, for as long as their batch lives.

    The teacher runs once per batch, up to the last block that teaches; not even that for windows
    seen before whose states of all those blocks fit into memory together.

    Args:
        activations: The run's own; gives the models.
        teacher_blocks: Indices of the blocks that teach.
    """

    def __init__(self, activations: Activations, teacher_blocks: Sequence[int]) -> None:
        super().__init__(activations.teacher, activations.student, 0)
        self._teacher_blocks = sorted(set(teacher_blocks))
        # Side by side, one row per window.
        self._kept: StateStore = activations.memory_for_all_levels(len(self._teacher_blocks))
        self._taught: WeakKeyDictionary[Batch, dict[int, HiddenStates]] = WeakKeyDictionary()
        self._handed: WeakKeyDictionary[Batch, tuple[int, State]] = WeakKeyDictionary()

    @torch.no_grad()
    def teacher_output(self, block: int, batch: Batch) -> HiddenStates:
        """The raw output of a teacher block."""
        if batch not in self._taught:
            width = self.teacher.hidden_size
            # Contiguous, so that sums run in the order they have in the other schedule.
            parts = [part.contiguous() for part in self._side_by_side(batch).split(width, dim=-1)]
            self._taught[batch] = dict(zip(self._teacher_blocks, parts, strict=True))
        return self._taught[batch][block]

    @torch.no_grad()
    def teacher_input(self, level: int, batch: Batch) -> HiddenStates:
        """What enters a teacher block after one that teaches."""
        return self.teacher_output(level - 1, batch)

    @torch.no_grad()
    def stand_by(self, block: int, batch: Batch) -> None:
        """Take part in a pass through a spread teacher that has no windows here."""
        if sharded_blocks(self.teacher.model) is not None and batch not in self._taught:
            self._keep_in_step(needs_it=False)
            self._taught[batch] = {}

    def stand_by_input(self, level: int, batch: Batch) -> None:
        """The same for the states that enter blocks, which are outputs of others."""
        self.stand_by(level - 1, batch)

    def _keep_in_step(self, *, needs_it: bool) -> None:
        """Gather the blocks that other processes are about to run, if this one runs none."""
        shards = sharded_blocks(self.teacher.model)
        assert shards is not None
        stop = self._teacher_blocks[-1] + 1
        lowest = shards.lowest(0 if needs_it else stop)
        for block in range(stop if needs_it else lowest, stop):
            shards.touch(block)

    def _side_by_side(self, batch: Batch) -> Tensor:
        """All teaching blocks' outputs, computed for the windows that are not known."""
        positions = range(len(batch.row_keys))
        new = [i for i in positions if batch.row_keys[i] not in self._kept.rows]
        old = [i for i in positions if batch.row_keys[i] in self._kept.rows]
        if sharded_blocks(self.teacher.model) is not None:
            self._keep_in_step(needs_it=bool(new))
        parts = {}
        if old:
            parts[tuple(old)] = self._read(rows_of(batch, old) if new else batch)
        if new:
            parts[tuple(new)] = self._computed(rows_of(batch, new) if old else batch)
        first = next(iter(parts.values()))
        if len(parts) == 1:
            return first
        whole = first.new_empty(len(positions), *first.shape[1:])
        for rows, part in parts.items():
            whole[list(rows)] = part.to(whole.dtype)
        return whole

    def _read(self, batch: Batch) -> Tensor:
        states = self._kept.read_batch(self._kept.rows[batch.row_keys[0]], batch.row_keys, batch)
        assert states is not None  # memory is taken to be sound
        return states

    def _computed(self, batch: Batch) -> Tensor:
        last = self._teacher_blocks[-1]
        states = self.teacher.block_states(batch.input_ids, batch.mask, stop_after=last)
        levels = [self.teacher.hidden(states[i + 1]) for i in self._teacher_blocks]
        side_by_side = torch.cat(levels, dim=-1)
        self._kept.write_batch(batch.row_keys, 0, side_by_side, batch)
        return side_by_side

    @torch.no_grad()
    def student_input(self, block: int, batch: Batch) -> State:
        """What earlier blocks made of this batch; those done with learning run here."""
        level, state = self._handed.get(batch, (0, None))
        if state is None:
            return self.student.state_entering(block, batch.input_ids, batch.mask)
        for index in range(level, block):
            state = self.student.advance(index, state, batch.input_ids, batch.mask)
        self._handed[batch] = (block, state)
        return state

    def forget(self) -> None:
        """Free the memory of the teacher's states."""
        super().forget()
        self._kept.clear()

    def hand_over(self, block: int, batch: Batch, output: State) -> None:
        """Keep a block's output, cut off from its graph, as the next block's input."""
        self._handed[batch] = (block + 1, output.detach())
