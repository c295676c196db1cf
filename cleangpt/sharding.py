"""A model whose blocks are spread over the processes of a run (FSDP2): each keeps a part of each.

A block that runs is gathered first, which takes all processes. FSDP2's own hooks do that, so any
model works; but the processes of a run do not run the same blocks equally often, since each knows
the states of other windows. So they agree: see :meth:`ShardedBlocks.lowest`. The blocks used last
stay whole, which spares gathering them again for the next batch. Embeddings, final norm and head
are not spread: the head's training reads them at every step.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cleangpt.blocks import BlockStack
from cleangpt.errors import UsageError
from cleangpt.runtime.placement import is_placed, whole_weights
from cleangpt.runtime.ranks import Ranks, join


class ShardedBlocks:
    """The spread blocks of one model.

    Args:
        stack: The model.
        ranks: The processes that share it; their group is open.
        device: Where it runs.

    Attributes:
        keep_whole: How many of the blocks used last stay whole; the same in all processes.
        gathers: How often a block was gathered so far.
    """

    def __init__(self, stack: BlockStack, ranks: Ranks, device: torch.device) -> None:
        self.keep_whole = 1
        self.gathers = 0
        self._ranks = ranks
        self._blocks: list[Any] = []
        self._whole: list[int] = []
        mesh = init_device_mesh(device.type, (ranks.count,))
        for index in range(stack.num_blocks):
            block: Any = stack.block(index)
            _bring(block, device)
            # Each block is a unit of its own, so a forward pass may stop after any of them. FSDP2
            # is not to spread a block again when it has run: that is decided here.
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
            block.register_forward_hook(lambda *_, used=index: self._used(used))
            self._blocks.append(block)

    def keep_for(self, layer_map: Sequence[int]) -> None:
        """Keep as many blocks whole as run for one student block once its inputs are known."""
        before = (-1, *layer_map[:-1])
        self.keep_whole = max(1, *(own - last for last, own in zip(before, layer_map, strict=True)))

    def lowest(self, level: int) -> int:
        """The lowest level of all processes, asked by all of them at once.

        What each of them must then do for every block from there on, in order: run it, or
        :meth:`touch` it.
        """
        return self._ranks.smallest(level)

    def touch(self, index: int) -> None:
        """Take part in gathering a block that this process has nothing to run through."""
        self._blocks[index].unshard()
        self._used(index)

    def _used(self, index: int) -> None:
        """Remember that a block was used, and spread the one whose last use is longest ago."""
        if index in self._whole:
            self._whole.remove(index)
        else:
            self.gathers += 1
        self._whole.append(index)
        while len(self._whole) > self.keep_whole:
            self._blocks[self._whole.pop(0)].reshard()


_SHARDED: "WeakKeyDictionary[nn.Module, ShardedBlocks]" = WeakKeyDictionary()


def shard_blocks(model: nn.Module, device: torch.device) -> ShardedBlocks:
    """Spread the blocks of a frozen model over the processes of the run, for good.

    All processes must call it at the same time, with the same model. One whose blocks are in their
    files (``load_teacher(places="disk")``) is read block by block, and never whole.

    Args:
        model: A causal LM that is not trained.
        device: Where it runs.

    Raises:
        UsageError: If there is only one process.
    """
    ranks = join(device)
    check_can_shard(ranks.count)
    _SHARDED[model] = ShardedBlocks(BlockStack(model), ranks, device)
    return _SHARDED[model]


def check_can_shard(processes: int) -> None:
    """Refuse to spread a model over a single process.

    Raises:
        UsageError: If there is only one.
    """
    if processes == 1:
        raise UsageError(
            "A teacher can be spread over several processes (--shard_teacher), and there is one.",
            "Start several with torchrun or accelerate launch, or use --teacher_device_map.",
        )


def sharded_blocks(model: nn.Module) -> ShardedBlocks | None:
    """What :func:`shard_blocks` made of the model; None if its blocks are whole."""
    return _SHARDED.get(model)


def _bring(block: nn.Module, device: torch.device) -> None:
    """Have a block's weights on the device, also where accelerate would fetch them when it runs."""
    if is_placed(block):
        from accelerate.hooks import remove_hook_from_module

        with whole_weights(block):
            weights = {name: parameter.data for name, parameter in block.named_parameters()}
        remove_hook_from_module(block, recurse=True)
        block.load_state_dict(weights, strict=False, assign=True)
        block.requires_grad_(False)
    block.to(device)
