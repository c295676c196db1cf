"""Texts by name, windows of tokens, and batches as a pure function of (seed, epoch).

Read ``text_sources`` for where documents come from, ``windows`` for how they become training items,
and ``batches`` for the order in which those items arrive. Names are loaded on first use: choosing a
text needs no torch, so a wrong name is refused at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cleangpt.data.batches import SeededSampler, make_dataloader
    from cleangpt.data.text_sources import TextSource, load_texts
    from cleangpt.data.windows import DistillationDataCollator, TextDataset

__all__ = [
    "DistillationDataCollator",
    "SeededSampler",
    "TextDataset",
    "TextSource",
    "load_texts",
    "make_dataloader",
]

_HOMES = {
    "DistillationDataCollator": "windows",
    "SeededSampler": "batches",
    "TextDataset": "windows",
    "TextSource": "text_sources",
    "load_texts": "text_sources",
    "make_dataloader": "batches",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that holds it."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"cleangpt.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
