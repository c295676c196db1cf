"""Where the blocks of a teacher go that does not fit on the training device.

accelerate keeps a block in host memory or in its safetensors file, fetches its weights when it runs
and drops them afterwards. Embeddings, final norm and head always lie on the training device: they
are small beside the blocks, and the head's training reads them at every step.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cleangpt.errors import UsageError
from cleangpt.runtime.launcher import on_this_machine
from cleangpt.runtime.memory import free_memory
from cleangpt.structure import find_blocks

logger = logging.getLogger(__name__)

DISK, HOST = "disk", "cpu"
FLAG = "--teacher_device_map"


def device_map(outline: nn.Module, asked: str, device: torch.device) -> dict[str, str]:
    """A place for every part of a model, by its name.

    Args:
        outline: The model, with or without weights.
        asked: "auto" (half of the training device's free memory, then half of the host's, then the
            files), or places in the order of the blocks, as "cuda=20,cpu=8,disk": a place with a
            number takes so many blocks, the last one without a number takes the rest.
        device: The training device.

    Raises:
        UsageError: If ``asked`` names no places, or not as many as there are blocks.
    """
    model: Any = outline
    blocks = find_blocks(outline, int(model.config.get_text_config().num_hidden_layers), None)
    if asked == "auto":
        sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
        outside = sum(p.nbytes for p in outline.parameters()) - sum(sizes)
        host = free_memory(torch.device(HOST)) // on_this_machine(os.environ)
        own = host if device.type == HOST else free_memory(device)
        rooms = {str(device): own // 2 - outside}
        if device.type != HOST:
            rooms[HOST] = host // 2
        places = filled(sizes, rooms)
    else:
        places = listed(asked, len(blocks))
    counts = ", ".join(f"{count} in {place}" for place, count in Counter(places).items())
    logger.info("The teacher's blocks: %s.", counts)
    names = {id(module): name for name, module in outline.named_modules()}
    found = dict.fromkeys(outside_names(outline, blocks), str(device))
    return found | {names[id(block)]: place for block, place in zip(blocks, places, strict=True)}


def bytes_on(device: torch.device, model: nn.Module) -> int:
    """What a model takes on its training device, with or without its weights.

    All of it, or by its ``hf_device_map`` what lies there and the largest of the parts that are
    fetched when they run.
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    away = []
    for name, place in getattr(model, "hf_device_map", {}).items():
        if place == DISK or torch.device(place).type != device.type:
            parts = model.named_parameters()
            away.append(sum(p.nbytes for own, p in parts if f"{own}.".startswith(f"{name}.")))
    return total - sum(away) + max(away, default=0)


def filled(sizes: Sequence[int], rooms: Mapping[str, int]) -> list[str]:
    """Blocks in order, each to the first place with room for it; what is left stays in its file.

    Example:
        >>> filled([4, 4, 4, 4], {"cuda": 9, "cpu": 5})
        ['cuda', 'cuda', 'cpu', 'disk']
    """
    places: list[str] = []
    left = dict(rooms)
    for size in sizes:
        while left and next(iter(left.values())) < size:
            del left[next(iter(left))]
        place = next(iter(left), DISK)
        if left:
            left[place] -= size
        places.append(place)
    return places


def listed(asked: str, num_blocks: int) -> list[str]:
    """The place of each block as a user wrote them.

    Example:
        >>> listed("cuda=1,disk", 3)
        ['cuda', 'disk', 'disk']

    Raises:
        UsageError: If it is not such a list, or does not have a place for each block.
    """
    places: list[str] = []
    parts = asked.split(",")
    for part in parts:
        place, _, count = part.strip().partition("=")
        is_last = part is parts[-1]
        if not is_place(place) or not (count.isdecimal() or (is_last and not count)):
            raise UsageError(
                f"{part.strip()!r} in {FLAG} {asked} is not a place (a device, cpu or disk) with a"
                " number of blocks.",
                f"Write {FLAG} auto, disk, or such as cuda=20,cpu=8,disk.",
            )
        places += [place] * (int(count) if count else max(0, num_blocks - len(places)))
    if len(places) != num_blocks:
        raise UsageError(
            f"{FLAG} {asked} has places for {len(places)} blocks, and the teacher has"
            f" {num_blocks}.",
            "Leave out the last number: that place takes the rest.",
        )
    return places


def is_place(name: str) -> bool:
    """Whether it is "disk", or a device that PyTorch knows."""
    try:
        return name == DISK or torch.device(name).type != "meta"
    except RuntimeError:
        return False


def outside_names(model: nn.Module, blocks: nn.ModuleList) -> Iterator[str]:
    """The names of the largest parts of a model that are no blocks and contain none.

    Parameters that hang directly on something that contains blocks are parts of their own.
    """
    inside = set(map(id, blocks.modules()))

    def visit(module: nn.Module, prefix: str) -> Iterator[str]:
        yield from (prefix + name for name, _ in module.named_parameters(recurse=False))
        yield from (prefix + name for name, _ in module.named_buffers(recurse=False))
        for name, child in module.named_children():
            if child is blocks:
                continue
            contains = any(id(part) in inside for part in child.modules())
            if contains:
                yield from visit(child, f"{prefix}{name}.")
            else:
                yield prefix + name

    yield from visit(model, "")
