"""The processes of one run: which of them this is, and what they tell each other.

``accelerate launch`` and ``torchrun`` start one Python process per device and tell each its rank in
the environment; Accelerate opens the group they talk in. Every process goes through the same
batches in the same order and computes its share of their rows; sums over all of them are what one
process would have computed, up to rounding. Process 0 alone writes files and speaks.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from cleangpt.errors import UsageError
from cleangpt.runtime.launcher import launched

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Args:
        index: Which one it is, from 0.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.index == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes in place of each tensor; float32 or float64 throughout."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
        """Sum gradients and loss over all processes, in place, in one message.

        A parameter that no process has a gradient of keeps none, as in a run of one process.
        """
        if self.count == 1:
            return
        has_gradient = torch.tensor(
            [float(p.grad is not None) for p in parameters], device=loss.device
        )
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.sum([loss, has_gradient, *gradients])
        for parameter, known in zip(parameters, has_gradient.tolist(), strict=True):
            if not known:
                parameter.grad = None

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        flags = torch.tensor(float(flag), device=device)
        distributed.all_reduce(flags)
        return bool(flags > 0)

    def from_main(self, value: T) -> T:
        """What process 0 has for ``value``; plain data only."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def after_main(self) -> Iterator[None]:
        """Enter only once process 0 has come here too."""
        self.from_main(None)
        yield

    def same_everywhere(self, value: str) -> bool:
        """Whether all processes have the same ``value``."""
        return len(set(self.gathered(value))) == 1

    def patient_group(self) -> Any:
        """A group for messages that some processes may be days late for; all call this together.

        It sends tensors of the host. None in a run of one process.
        """
        if self.count == 1:
            return None
        return distributed.new_group(backend="gloo", timeout=timedelta(days=30))

    def gathered(self, value: T, group: Any = None) -> list[T]:
        """Everyone's ``value``, in the order of the processes; plain data only."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=group)
        return values

    @torch.no_grad()
    def copy_from(self, owner: int, tensors: Sequence[Tensor], group: Any) -> None:
        """Put what process ``owner`` has in place of each tensor.

        Args:
            owner: The process.
            tensors: The same ones everywhere.
            group: From :meth:`patient_group`.
        """
        if self.count == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().cpu()
            distributed.broadcast(sent, src=owner, group=group)
            tensor.detach().copy_(sent)

    @torch.no_grad()
    def copy_from_main(self, model: nn.Module) -> None:
        """Give the model the weights it has in process 0."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, src=0)


def join(device: str | torch.device) -> Ranks:
    """Open the group of processes if a launcher started several, and return this one's place.

    Args:
        device: Where the run computes; "cuda" gives each process a GPU of its own to default to.

    Raises:
        UsageError: If the processes cannot find each other.
    """
    if distributed.is_available() and distributed.is_initialized():
        return Ranks(distributed.get_rank(), distributed.get_world_size())
    if launched(os.environ)[1] == 1:
        return Ranks()
    from accelerate import PartialState

    try:
        state = PartialState(cpu=torch.device(device).type == "cpu")
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"The processes of this run cannot form a group: {' '.join(str(error).split())[:200]}",
            "Start them with accelerate launch or torchrun, or unset RANK and WORLD_SIZE.",
        ) from error
    return Ranks(state.process_index, state.num_processes)


def leave() -> None:
    """Close the group, at the end of a command."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class RowShares:
    """Which rows of a batch are whose: equal numbers, and so far as that goes, those seen before.

    Every process keeps the same book, so nothing is sent. A row stays with the process that
    computed it first, which has its frozen states, except where a batch holds too many rows of one.

    Args:
        ranks: The processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._owners: dict[bytes, int] = {}

    def own(self, keys: Sequence[bytes]) -> list[int]:
        """The positions in ``keys`` of this process's rows; may be none of a small batch."""
        left = [-(-len(keys) // self.ranks.count)] * self.ranks.count
        given: dict[int, int] = {}
        for position, key in enumerate(keys):
            owner = self._owners.get(key)
            if owner is not None and left[owner]:
                given[position] = owner
                left[owner] -= 1
        for position, key in enumerate(keys):
            if position not in given:
                emptiest = max(range(self.ranks.count), key=lambda rank: (left[rank], -rank))
                given[position] = emptiest
                left[emptiest] -= 1
                self._owners.setdefault(key, emptiest)
        return [position for position in range(len(keys)) if given[position] == self.ranks.index]
