"""The processes of one run: which of them this is, and what they tell each other.

``accelerate launch`` and ``torchrun`` start one Python process per device and tell each its rank in
the environment; Accelerate opens the group they talk in. Every process goes through the same
batches in the same order and computes its share of their rows; sums over all of them are what one
process would have computed, up to rounding. Process 0 alone writes files and speaks.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from cleangpt.errors import CleanGPTError, UsageError
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

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """Which rows of a batch are this process's: equal numbers, to one row; may be none.

        A function of the batch alone, so that a resumed run shares as one that never stopped. The
        lowest keys are the first process's, and so on. Keys are hashes, so most rows go to the same
        process in every batch, and it has their frozen states.

        Args:
            keys: A key per row.
        """
        order = sorted(range(len(keys)), key=keys.__getitem__)
        start, end = (-(-i * len(keys) // self.count) for i in (self.index, self.index + 1))
        return sorted(order[start:end])

    def gather(self, tensor: Tensor) -> Tensor:
        """What every process has for ``tensor``, one after the other along a new first axis."""
        if self.count == 1:
            return tensor[None]
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(found, tensor.contiguous())
        return torch.stack(found)

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
        return self.smallest(-int(flag)) < 0

    def smallest(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        if self.count == 1:
            return number
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        found = torch.tensor(number, device=device)
        distributed.all_reduce(found, op=distributed.ReduceOp.MIN)
        return int(found)

    def from_main(self, value: T) -> T:
        """What process 0 has for ``value``; plain data only."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def done_by_main(self, work: Callable[[], T]) -> T:
        """What process 0 gets from ``work``, which only it does; plain data only.

        Raises:
            CleanGPTError: In every process, if process 0 meets one.
        """
        if self.count == 1:
            return work()
        message: Any = None
        if self.is_main:
            try:
                message = work(), None
            except CleanGPTError as error:
                message = None, (type(error), error.cause, error.remedy)
        found, refusal = self.from_main(message)
        if refusal is not None:
            kind, cause, remedy = refusal
            raise kind(cause, remedy)
        done: T = found
        return done

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
