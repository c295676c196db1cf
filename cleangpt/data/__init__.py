"""Texts by name, windows of tokens, and batches as a pure function of (seed, epoch).

Read ``text_sources`` for where documents come from, ``windows`` for how they become training items,
and ``batches`` for the order in which those items arrive.
"""

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
