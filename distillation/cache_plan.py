"""Where the frozen states of a run can be kept, decided from numbers alone.

``plan_cache`` is a pure function of what is needed and what is free; the other functions here find
those numbers. Nothing is kept or opened here.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CACHES = ("auto", "ram", "disk", "off")
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""How states are kept, by the name of the setting ``activation_dtype``."""

_OFF = "nowhere (activation_cache=off): both models run up to the block in training for every batch"


@dataclass(frozen=True)
class CachePlan:
    """Where states are kept.

    Args:
        kind: "ram", "disk" or "off".
        budget_bytes: The bytes they may take there.
        reason: One line that says why, with the numbers.
    """

    kind: str
    budget_bytes: int
    reason: str


def plan_cache(
    setting: str, need_bytes: int | None, free_ram: int, free_disk: int, budget: int | None
) -> CachePlan:
    """Choose where frozen states are kept.

    Args:
        setting: "auto", "ram", "disk" or "off".
        need_bytes: What the whole run needs (:func:`needed_bytes`); None if it is not known.
        free_ram: Free bytes of the memory that states would lie in.
        free_disk: Free bytes of the run directory's disk.
        budget: Bytes the states may take; None is half of what is free. Never more than is free.
    """
    if setting == "off":
        return CachePlan("off", 0, _OFF)
    rooms = {"ram": _room("memory", free_ram, budget), "disk": _room("disk", free_disk, budget)}
    kind = setting if setting != "auto" else _choice(need_bytes, rooms)
    room, words = rooms[kind]
    place = {"ram": "in memory", "disk": "on disk"}[kind]
    asked = "" if setting == "auto" else f" (activation_cache={setting})"
    if need_bytes is None:
        return CachePlan(kind, room, f"{place}{asked}: {words}; the data's size is not known")
    need = f"{shown_bytes(need_bytes)} needed"
    if need_bytes <= room:
        seen = [rooms["ram"][1]] if setting == "auto" and kind == "disk" else []
        return CachePlan(kind, room, f"{place}{asked}: {need}, {', '.join([*seen, words])}")
    others = f", {rooms['disk'][1]}" if setting == "auto" else ""
    rest = "what does not fit is computed for every batch"
    return CachePlan(kind, room, f"{place}{asked}: {need}, {words}{others}; {rest}")


def cache_setting(activation_cache: str, keep_activations: bool) -> str:
    """The cache two settings ask for together: what is to stay goes to disk."""
    return "disk" if activation_cache == "auto" and keep_activations else activation_cache


def needed_bytes(positions: int, widths: Sequence[int], dtype: str) -> int:
    """Bytes of what the rolling store holds at a time.

    Args:
        positions: Valid positions of the data.
        widths: d_state of each state kept per position: the teacher's and the student's, which can
            be more than its hidden size.
        dtype: "fp32" or "bf16".
    """
    return positions * sum(widths) * STATE_DTYPES[dtype].itemsize


def tokens_that_fit(budget: int, widths: Sequence[int], dtype: str, levels: int = 0) -> int:
    """The tokens whose states fit into a budget of bytes.

    Args:
        budget: Bytes.
        widths: d_state of each state kept per position, the teacher's first.
        dtype: "fp32" or "bf16".
        levels: Teaching blocks, where the teacher's states of all of them are wanted at a time (in
            "parallel_local", and for a polish on hidden states); 0 where they never are.
    """
    all_levels = needed_bytes(1, [widths[0]] * levels, dtype)
    return budget // max(needed_bytes(1, widths, dtype), all_levels)


def positions_in(loader: Any) -> int | None:
    """The positions of one pass over a loader, at most; None if it cannot tell.

    The loader is not iterated: drawing a batch would consume the user's random numbers.
    """
    dataset: Any = getattr(loader, "dataset", None)
    tokens = getattr(dataset, "num_tokens", None)
    if isinstance(tokens, int):
        return tokens
    owners = (dataset, getattr(loader, "collate_fn", None))
    sizes = [getattr(owner, "block_size", None) for owner in owners]
    known = [size for size in sizes if isinstance(size, int)]
    if not known or not hasattr(dataset, "__len__"):
        return None
    return len(dataset) * known[0]


def free_disk(path: Path) -> int:
    """Free bytes of the disk on which ``path`` is or will be."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free


def shown_bytes(size: int) -> str:
    """Bytes for people, in powers of 1000: "1.5 GB", "20 MB"."""
    shown = float(f"{size:.3g}")  # first: 999,600 bytes are 1 MB, not 1e+03 kB
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if shown < 1000:
            return f"{shown:.3g} {unit}"
        shown /= 1000
    return f"{shown:.3g} PB"


def _room(place: str, free: int, budget: int | None) -> tuple[int, str]:
    """The bytes that may be taken, and where that number is from."""
    if budget is None:
        return free // 2, f"{shown_bytes(free // 2)} is half of the free {place}"
    if budget > free:
        return free, f"{shown_bytes(free)} of {place} is free, less than activation_cache_gb"
    return budget, f"{shown_bytes(budget)} of {place} allowed by activation_cache_gb"


def _choice(need_bytes: int | None, rooms: dict[str, tuple[int, str]]) -> str:
    """Memory if all fits there or the size is unknown, else the disk if all fits there."""
    if need_bytes is None or need_bytes <= rooms["ram"][0]:
        return "ram"
    return "disk" if need_bytes <= rooms["disk"][0] else "ram"
