"""The order of training items: a pure function of (seed, epoch), so a run can be resumed exactly.

Knows nothing about texts or models. The loader owns its random generators and never draws from
torch's global one, so iterating over data does not change dropout.
"""

import atexit
import hashlib
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cleangpt.errors import UsageError

WORKER_SECONDS = 300.0
"""How long a worker process may take for one batch: one that hangs must not hang the run."""


def _generator(seed: int, epoch: int) -> torch.Generator:
    """A generator seeded by a hash, so neighbouring seeds and epochs have unrelated orders."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class SeededSampler(Sampler[int]):
    """Every index once per epoch, in an order that depends on (seed, epoch) and nothing else.

    Call ``set_epoch`` before each epoch; without it every epoch has the order of epoch 0.

    Args:
        num_items: Number of items, >= 0.
        seed: Any integer.
        shuffle: False gives 0, 1, 2, ... in every epoch.
    """

    def __init__(self, num_items: int, seed: int = 0, shuffle: bool = True) -> None:
        self.num_items = num_items
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of items."""
        return self.num_items

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the current epoch in order."""
        if not self.shuffle:
            return iter(range(self.num_items))
        order = torch.randperm(self.num_items, generator=_generator(self.seed, self.epoch))
        return iter(order.tolist())


def make_dataloader(
    dataset: Dataset[Any],
    collator: Callable[[list[Any]], dict[str, Tensor]],
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Return a loader whose ``sampler`` is a ``SeededSampler``; the last batch may be smaller.

    Args:
        dataset: Items with a length, such as ``TextDataset``.
        collator: Turns a list of items into one batch.
        batch_size: Items per batch, >= 1.
        seed: Seed of the order.
        shuffle: False keeps the order of the data set.
        num_workers: Worker processes; 0 collates in this process. The batches are the same.

    Raises:
        UsageError: If ``batch_size`` or ``num_workers`` is out of range, or there are workers for a
            data set that changes while it is used.
    """
    _check_numbers(dataset, batch_size, num_workers)
    if num_workers:
        # A fast tokenizer used before the fork prints a warning in every worker unless this is set.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    num_items = len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not promise a length
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=SeededSampler(num_items, seed, shuffle),
        collate_fn=collator,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        timeout=WORKER_SECONDS if num_workers else 0.0,
        # The loader draws a seed for its workers each epoch, from torch's global generator if it
        # has none of its own.
        generator=_generator(seed, -1),
        worker_init_fn=_leave_signals_to_the_run if num_workers else None,
        # Only from pinned memory can a GPU copy while it computes.
        pin_memory=torch.cuda.is_available(),
    )
    if num_workers:
        reference = weakref.ref(loader)
        atexit.register(_end_workers, reference)
        # A process that multiprocessing has forked knows no atexit. Before 10: the queues' end.
        Finalize(None, _end_workers, args=(reference,), exitpriority=20)
    return loader


def _check_numbers(dataset: Dataset[Any], batch_size: int, num_workers: int) -> None:
    if batch_size < 1:
        raise UsageError(
            f"batch_size is {batch_size}; a batch holds at least one window.",
            "Set batch_size (--batch_size) to 1 or more.",
        )
    if num_workers < 0:
        raise UsageError(
            f"num_workers is {num_workers}; it counts processes.",
            "Set num_workers (--num_workers) to 0 or more.",
        )
    if num_workers and getattr(dataset, "passes", 1) > 1:
        raise UsageError(
            f"{num_workers} workers would go on with the first pass of a stream of several.",
            "Set num_workers (--num_workers) to 0.",
        )


def end_workers(loader: Any) -> None:
    """End the worker processes of a loader; if it is used again it starts new ones.

    Args:
        loader: A loader, with or without workers.
    """
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


def _end_workers(reference: Any) -> None:
    """End the workers of a loader that is still there when Python exits.

    Python ends such processes by SIGTERM and waits for them, and they ignore it.
    """
    end_workers(reference())


def _leave_signals_to_the_run(worker: int) -> None:
    """A signal to all processes of a group must not take the workers from under the last step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
