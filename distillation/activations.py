"""Where a stage's inputs and targets come from: the rolling activation store.

For every window the store keeps two states: what enters the student block in training, and the raw
output of its teacher block. When the next block asks, a window's states move on from where they
are, by the blocks in between. So the whole backbone costs one teacher forward and one
frozen-student forward over the data, however many blocks and epochs there are, and what is kept is
one level, not all of them. Heads never run for it.

Windows are found by their tokens, so any loader, in any order, works; a window never seen, or one
that there is no room for, is computed from its tokens. Only what is frozen may be kept: a state
whose model has other weights by now is dropped. Memory and files are in ``state_store``, and what
decides between them in ``cache_plan``.
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cleangpt.blocks import BlockStack, HiddenStates, State
from cleangpt.runtime.launcher import launched, on_this_machine
from cleangpt.runtime.memory import free_memory
from cleangpt.runtime.module_state import preserved_modes
from cleangpt.sharding import sharded_blocks
from distillation.batch import Batch
from distillation.cache_plan import (
    STATE_DTYPES,
    CachePlan,
    cache_setting,
    free_disk,
    needed_bytes,
    plan_cache,
)
from distillation.config import DistillationConfig
from distillation.disk_store import DiskStore
from distillation.rolling_states import RollingStates, StatesInStep, level_weights
from distillation.state_store import Budget, RamStore, StateStore

logger = logging.getLogger(__name__)


class Activations:
    """Frozen states of both models, from memory where they are known.

    Args:
        teacher: The model whose hidden states are learnt.
        student: The model that learns.
        budget_bytes: Memory the kept states may take outside of :meth:`opened`; 0 keeps none, and
            both models run up to the block in training for every batch.

    Attributes:
        expected: The bytes of states that are to lie in memory ("ram") and in files ("disk"), by
            the last :meth:`plan`; 0 if the data's size is not known.
    """

    def __init__(self, teacher: BlockStack, student: BlockStack, budget_bytes: int) -> None:
        self.teacher = teacher
        self.student = student
        self._is_open = False
        self._positions = 0
        self._budget_bytes = budget_bytes
        self.expected = {"ram": 0, "disk": 0}
        self._keep_in_memory(budget_bytes, torch.float32)

    @property
    def bytes_kept(self) -> int:
        """Memory or disk taken by kept states."""
        return self._budget.used

    @contextmanager
    def opened(
        self, config: DistillationConfig, folder: Path, positions: int | None, precision: str
    ) -> Iterator[None]:
        """Keep states where the settings say, for as long as the block runs.

        Opening again inside the block changes nothing.

        Args:
            config: The settings ``activation_cache`` and its kin.
            folder: Where files of states go, if there are any.
            positions: Valid positions of the data; None if that is not known.
            precision: The name of the precision both models run at.

        Raises:
            CheckpointError: If files of an earlier run are there, and are damaged or of other
                models or settings.
        """
        if self._is_open:
            yield
            return
        self._positions = positions or 0
        plan = self.plan(config, folder, positions)
        logger.info("Frozen states are kept %s.", plan.reason)
        if plan.kind == "disk":
            self._keep_on_disk(plan.budget_bytes, config, folder, precision)
        else:
            self._keep_in_memory(plan.budget_bytes, STATE_DTYPES[config.activation_dtype])
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            for states in self._rolling:
                states.finish(keep=config.keep_activations)
            with contextlib.suppress(OSError):  # not there, or something of the user's is in it
                folder.rmdir()
                if launched(os.environ)[1] > 1:
                    folder.parent.rmdir()  # of all processes; the last one finds it empty
            self._keep_in_memory(self._budget_bytes, torch.float32)

    @torch.no_grad()
    def teacher_output(self, block: int, batch: Batch) -> HiddenStates:
        """The raw output of a teacher block."""
        return self.teacher.hidden(self._teacher_states.entering(block + 1, batch))

    @torch.no_grad()
    def teacher_input(self, level: int, batch: Batch) -> HiddenStates:
        """What enters a teacher block, for a student block that learns from the teacher's states.

        Kept apart from its outputs: each is rolled on by itself.
        """
        return self.teacher.hidden(self._teacher_inputs.entering(level, batch))

    @torch.no_grad()
    def student_input(self, block: int, batch: Batch) -> State:
        """What enters a student block; the blocks before it must be frozen.

        ``block == num_blocks`` is the last block's raw output.
        """
        return self._student_states.entering(block, batch)

    def memory_for_all_levels(self, levels: int) -> RamStore:
        """Memory within this store's budget for a schedule that needs many levels at a time.

        None of it where they do not all fit: of a batch in random order nearly always some window
        would be missing. Rolling states in memory make room, which such a schedule has no use for.
        Files are left to them: all levels of data too big for memory would be many times as big on
        disk.
        """
        dtype = self._teacher_states.store.dtype
        own = math.ceil(self._positions / launched(os.environ)[1])
        need = own * levels * self.teacher.hidden_size * dtype.itemsize
        fits = isinstance(self._teacher_states.store, RamStore) and need <= self._budget.limit
        if fits:
            self.forget()
        return RamStore(self._budget if fits else Budget(0), dtype)

    @torch.no_grad()
    def stand_by(self, block: int, batch: Batch) -> None:
        """Take part in what all processes of a run do for :meth:`teacher_output`.

        Called instead of it where a process has nothing to learn from its share of a batch.
        """
        if sharded_blocks(self.teacher.model) is not None:
            self._teacher_states.entering(block + 1, batch)

    @torch.no_grad()
    def stand_by_input(self, level: int, batch: Batch) -> None:
        """The same for :meth:`teacher_input`."""
        if sharded_blocks(self.teacher.model) is not None:
            self._teacher_inputs.entering(level, batch)

    def hand_over(self, block: int, batch: Batch, output: State) -> None:
        """Told what a student block in training made of a batch; of no use here.

        A block's output is only what later blocks get once it has finished learning.
        """

    def forget(self) -> None:
        """Drop all states; needed before a student whose frozen parts have changed is read."""
        for states in self._rolling:
            states.clear()

    def plan(self, config: DistillationConfig, folder: Path, positions: int | None) -> CachePlan:
        """Choose where states would be kept now; the arguments are those of :meth:`opened`."""
        setting = cache_setting(config.activation_cache, config.keep_activations)
        limit = config.activation_cache_gb
        widths = kept_widths(self.teacher, self.student, config.block_inputs)
        processes, sharing = launched(os.environ)[1], on_this_machine(os.environ)
        need = None
        if positions is not None:
            # Each process keeps the windows that it computes, and decoupled that is all of them.
            sharing_rows = 1 if config.schedule == "decoupled" else processes
            need = needed_bytes(positions, widths, config.activation_dtype) // sharing_rows
        plan = plan_cache(
            setting,
            need,
            free_memory(self.teacher.device) // sharing,
            free_disk(folder) // sharing,
            None if limit is None else int(limit * 1e9) // sharing,
        )
        room = min(need or 0, plan.budget_bytes)
        self.expected = {kind: room if kind == plan.kind else 0 for kind in ("ram", "disk")}
        return plan

    def _keep_in_memory(self, budget_bytes: int, dtype: torch.dtype) -> None:
        self._budget = Budget(budget_bytes)
        self._use(*(RamStore(self._budget, dtype) for _ in range(3)))

    def _keep_on_disk(
        self, budget_bytes: int, config: DistillationConfig, folder: Path, precision: str
    ) -> None:
        self._budget = Budget(budget_bytes)
        dtype = STATE_DTYPES[config.activation_dtype]
        stores: list[DiskStore] = []
        kept = [("teacher", self.teacher), ("student", self.student)]
        if config.block_inputs != "student":
            kept.append(("inputs", self.teacher))
        try:
            for name, stack in kept:
                header = {"model": name, "d_state": state_width(stack), "precision": precision}
                path, weights = folder / f"{name}.states", level_weights(stack)
                stores.append(DiskStore(path, header, weights, self._budget, dtype))
        except BaseException:
            for store in stores:
                store.close()
            raise
        self._use(*stores, *(RamStore(Budget(0), dtype) for _ in range(3 - len(stores))))

    def _use(self, *stores: StateStore) -> None:
        self._teacher_states = self._of_teacher(stores[0])
        self._student_states = RollingStates(self.student, stores[1], learns=True)
        self._teacher_inputs = self._of_teacher(stores[2])
        self._rolling = (self._teacher_states, self._student_states, self._teacher_inputs)

    def _of_teacher(self, store: StateStore) -> RollingStates:
        shards = sharded_blocks(self.teacher.model)
        if shards is not None:
            return StatesInStep(self.teacher, store, shards)
        return RollingStates(self.teacher, store, learns=False)


@torch.no_grad()
def state_width(stack: BlockStack) -> int:
    """The width of what flows between a model's blocks; may be more than its hidden size."""
    with preserved_modes(stack.model):
        stack.model.eval()  # dropout would draw random numbers
        return int(stack.embed(stack.probe_ids()).shape[-1])


def kept_widths(teacher: BlockStack, student: BlockStack, block_inputs: str) -> list[int]:
    """The widths of the states that are kept of each position, one level of each at a time."""
    widths = [state_width(teacher), state_width(student)]
    return widths if block_inputs == "student" else [*widths, widths[0]]
