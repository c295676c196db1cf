"""Texts by name, windows of tokens, and batches as a pure function of (seed, epoch).

Read ``text_sources`` for where documents come from, ``windows`` for how they become training items,
and ``batches`` for the order in which those items arrive; ``streams`` and ``streamed_windows`` are
the same for texts that do not fit. Names are loaded on first use: choosing a text needs no torch,
so a wrong name is refused at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cleangpt.data.batches import SeededSampler, make_dataloader
    from cleangpt.data.streamed_windows import StreamedWindows
    from cleangpt.data.streams import TextStream, open_stream
    from cleangpt.data.text_sources import TextSource, load_texts
    from cleangpt.data.windows import DistillationDataCollator, TextDataset

__all__ = [
    "DistillationDataCollator",
    "SeededSampler",
    "StreamedWindows",
    "TextDataset",
    "TextSource",
    "TextStream",
    "load_texts",
    "make_dataloader",
    "open_stream",
]

_HOMES = {
    "DistillationDataCollator": "windows",
    "SeededSampler": "batches",
    "StreamedWindows": "streamed_windows",
    "TextDataset": "windows",
    "TextSource": "text_sources",
    "TextStream": "streams",
    "load_texts": "text_sources",
    "make_dataloader": "batches",
    "open_stream": "streams",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that holds it."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"cleangpt.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
