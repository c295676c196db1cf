"""``--layer_map measured``: the blocks that the teacher can least do without."""

import argparse
import logging
from typing import TYPE_CHECKING, Any

from distillation.layer_map import MEASURED, measured_layer_map

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cleangpt.runtime.ranks import Ranks
    from cleangpt.teacher import Teacher

logger = logging.getLogger(__name__)


def settle_layer_map(
    arguments: argparse.Namespace,
    teacher: "Teacher",
    student: "nn.Module",
    loader: Any,
    ranks: "Ranks",
    device: "torch.device",
) -> bool:
    """Put the map that is found in the place of ``measured``; a run that goes on keeps its own.

    Args:
        arguments: The parsed flags; changed.
        teacher: What is measured.
        student: For its number of blocks.
        loader: The training batches.
        ranks: The processes of the run, which must agree.
        device: Where the run trains, and this is measured.

    Returns:
        Whether the map was to be measured.
    """
    if arguments.layer_map != MEASURED:
        return False

    from cleangpt.blocks import BlockStack
    from cleangpt.run_directory import RunDirectory
    from cleangpt.runtime.placement import to_device
    from distillation.block_costs import block_costs

    known = RunDirectory(arguments.output_dir).manifest() if arguments.resume else None
    if known and known.get("layer_map"):
        arguments.layer_map = known["layer_map"]
        return True
    to_device(teacher.model, device)
    costs = ranks.from_main(block_costs(BlockStack(teacher.model), loader))
    blocks = BlockStack(student).num_blocks
    arguments.layer_map = list(measured_layer_map(costs, blocks))
    logger.info(
        "What the teacher loses without a block, in nats of KL: %s",
        ", ".join(f"{block}: {cost:.3g}" for block, cost in enumerate(costs)),
    )
    return True
