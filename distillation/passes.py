"""Data that do not fit, a pass at a time: which pass a stage is in, and where that is written down.

A data set with several passes says how many (``passes``), shows the windows of one, and goes to
another when told (``enter``); ``cleangpt.data.StreamedWindows`` is one, and tells what the passes
cost. Any other data set is one pass. A stage spends all its epochs on a pass before it goes to the
next, so an epoch of a stage is one of its *rounds*: rounds 0 to E - 1 are of its first pass, and so
on. Stages go round in a circle, each beginning with the pass that the one before ended with.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

from cleangpt.run_directory import RunDirectory

logger = logging.getLogger(__name__)

INDEX_NAME = "stream.json"


def passes_of(loader: Any) -> int:
    """How many passes a loader's data come in."""
    return int(getattr(getattr(loader, "dataset", None), "passes", 1))


def enter_pass(loader: Any, index: int, run: RunDirectory) -> bool:
    """Let the loader yield the windows of a pass; return whether it yielded others before.

    Args:
        loader: Of data in passes, or any other, which stays as it is.
        index: The pass, from 0.
        run: Where the places of passes are written down, for a run that goes on.

    Raises:
        InputError: If the data cannot be read, or have changed since the run began.
    """
    if passes_of(loader) == 1 or loader.dataset.entered == index:
        return False
    path = run.path / INDEX_NAME
    if run.is_open and path.is_file():
        try:
            loader.dataset.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is not used (%s): the stream is read anew", path, error)
    loader.dataset.enter(index)
    if run.is_open:
        run.write_json(INDEX_NAME, loader.dataset.state_dict())
    return True


def counted_epochs(schedule: str, blocks: Sequence[int], others: Sequence[int]) -> int:
    """The passes over the data whose steps a run's journal counts.

    Args:
        schedule: Blocks together are counted once, decoupled ones apart.
        blocks: Epochs of each student block.
        others: Epochs of the head and of the polish, if there are any.
    """
    counted = {"sequential": sum(blocks), "parallel_local": max(blocks), "decoupled": 0}
    return counted[schedule] + sum(others)
