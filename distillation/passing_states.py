"""States for blocks that learn together: each block's output is handed on as the next one's input.

One forward pass through the student serves all blocks; nothing flows back from one to another.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from cleangpt.blocks import HiddenStates, State
from distillation.activations import Activations
from distillation.batch import Batch


class PassingStates(Activations):
    """What the blocks of one pass give each other, for as long as their batch lives.

    The teacher runs once per batch, up to the last block that teaches.

    Args:
        activations: The run's own; gives the models.
        teacher_blocks: Indices of the blocks that teach.
    """

    def __init__(self, activations: Activations, teacher_blocks: Sequence[int]) -> None:
        super().__init__(activations.teacher, activations.student, 0)
        self._teacher_blocks = sorted(set(teacher_blocks))
        self._taught: WeakKeyDictionary[Batch, dict[int, HiddenStates]] = WeakKeyDictionary()
        self._handed: WeakKeyDictionary[Batch, tuple[int, State]] = WeakKeyDictionary()

    @torch.no_grad()
    def teacher_output(self, block: int, batch: Batch) -> HiddenStates:
        """The raw output of a teacher block."""
        if batch not in self._taught:
            states = self.teacher.block_states(
                batch.input_ids, batch.mask, stop_after=self._teacher_blocks[-1]
            )
            self._taught[batch] = {
                i: self.teacher.hidden(states[i + 1]) for i in self._teacher_blocks
            }
        return self._taught[batch][block]

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

    def hand_over(self, block: int, batch: Batch, output: State) -> None:
        """Keep a block's output, cut off from its graph, as the next block's input."""
        self._handed[batch] = (block + 1, output.detach())
