"""Before the long run: can every stage learn at all?

A stage whose gradients do not reach its weights, whose inputs carry no signal or whose loss is
ruled by something no weight can move looks like a hard problem for hours. On one small batch it
shows in a second: the loss does not fall.
"""

import copy
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from cleangpt.errors import InputError
from cleangpt.runtime.module_state import preserved_modes
from cleangpt.runtime.precision import Precision
from distillation.activations import Activations
from distillation.batch import Batch, rows_of
from distillation.logit_stages import HeadStage, untied_for_now
from distillation.stages import Stage

logger = logging.getLogger(__name__)

STEPS = 40
LEARNING_RATE = 3e-3
MUST_FALL_BY = 0.1
ALREADY_LEARNT = 1e-3
WINDOWS = 2
GATE_BYTES = 256 * 2**20
"""Memory for the states of the few windows that are looked at."""


def check_run_learns(backbone: Any, head: Any, polish: Any) -> None:
    """Let every stage of a run show on a few windows that it learns, on states of its own.

    Args:
        backbone: The run's backbone trainer.
        head: Its head trainer; None if there is no head phase.
        polish: Its polish trainer; None if there is no polish.

    Raises:
        InputError: As :func:`check_stages_learn`.
    """
    first = next(iter(backbone.batches(0)))
    batch = rows_of(first, list(range(min(WINDOWS, len(first.input_ids)))))
    states = Activations(backbone.teacher, backbone.student, GATE_BYTES)
    stages: list[Stage] = [*backbone.stages(states)]
    tied = backbone.config.head_tying == "tie"
    with nullcontext() if tied else untied_for_now(backbone.student):
        if head is not None:
            weight = head.config.logit_loss_weight
            stages.append(HeadStage(states, head.logit_loss_fn, loss_weight=weight))
        if polish is not None:
            stages.append(polish.stage(states))
        check_stages_learn(stages, batch, backbone.precision, backbone.device)


def check_stages_learn(
    stages: Sequence[Stage], batch: Batch, precision: Precision, device: torch.device
) -> None:
    """Let each stage learn a small batch until that shows; the weights are as before afterwards.

    Args:
        stages: In the order of the run. Each finds the others' weights as they are now.
        batch: A few windows; the first two are used.
        precision: The run's precision.
        device: Where the run trains.

    Raises:
        InputError: Naming the stage, if its loss does not fall by a tenth in ``STEPS`` steps, and
            was not next to nothing from the start.
    """
    batch = rows_of(batch, list(range(min(WINDOWS, len(batch.input_ids)))))
    for stage in stages:
        modules = [stage.student.model, *stage.modules().values()]
        with torch.random.fork_rng(), preserved_modes(*modules):
            torch.manual_seed(0)
            losses = _losses_until_learnt(stage, batch, precision, device)
        first, best = losses[0], min(filter(math.isfinite, losses), default=math.nan)
        steps = len(losses) - 1
        how = f"{best:.4g} after {steps} step{'s' * (steps > 1)}" if steps else "nothing to learn"
        logger.info("%s on one small batch: loss %.4g, %s.", stage.name, first, how)
        if not _has_learnt(first, best):
            raise InputError(
                f"{stage.name} cannot learn: on one small batch its loss went from {first:.4g} to"
                f" {best:.4g} in {steps} steps.",
                "If the teacher has massive activations, choose --distill_loss_type nmse; else look"
                " at the student's block. --no_overfit_gate goes on regardless.",
            )


def _has_learnt(first: float, loss: float) -> bool:
    return first <= ALREADY_LEARNT or loss < (1 - MUST_FALL_BY) * first


def _losses_until_learnt(
    stage: Stage, batch: Batch, precision: Precision, device: torch.device
) -> list[float]:
    """The losses before the first step and after each, until one shows that the stage learns."""
    for parameter in stage.student.model.parameters():
        parameter.requires_grad_(False)
    stage.student.model.eval()  # dropout would hide what is asked
    parameters = list(stage.trainable_parameters().values())
    before = copy.deepcopy([parameter.detach() for parameter in parameters])
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    losses: list[float] = []
    try:
        while True:
            optimizer.zero_grad(set_to_none=True)
            with precision.autocast(device):
                loss = stage.loss(batch)
            losses.append(float(loss.detach()))
            is_decided = _has_learnt(losses[0], losses[-1]) or not math.isfinite(losses[-1])
            if is_decided or len(losses) > STEPS:
                return losses
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        optimizer.zero_grad(set_to_none=True)
