"""A few steps of every stage of a run, on copies and in a place that is deleted."""

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillation.commands.distil import build_trainer, train

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cleangpt.teacher import Teacher

STEPS = 3
SMALL_MODEL = 20_000_000
"""Parameters of a teacher below which a step takes a thread some tenths of a second."""
FIRST_POSITION_IS_HUGE = 10.0
"""Ratio of norms from which the first token of a window rules a raw squared error."""
_RAW_LOSSES = ("mse", "smooth_l1")


@dataclass(frozen=True)
class DryLoss:
    """The first and the last loss of one stage."""

    stage: str
    first: float
    last: float


@dataclass(frozen=True)
class DrySteps:
    """What the steps showed.

    Args:
        losses: Of every stage that the run has.
        advice: What the teacher's hidden states ask for; may be empty.
    """

    losses: list[DryLoss]
    advice: str


def dry_steps(
    arguments: argparse.Namespace,
    teacher: "Teacher",
    student: "nn.Module",
    batch: dict[str, Any],
    device: "torch.device",
) -> DrySteps:
    """Train a copy of the student for a few steps of every stage that the flags ask for.

    Args:
        arguments: The run's flags.
        teacher: The teacher.
        student: The student, which is not changed.
        batch: All that is trained on.
        device: Where.

    Raises:
        CleanGPTError: As the run would.
    """
    own = argparse.Namespace(**vars(arguments))
    for name in ("epochs_per_block", "lm_head_epochs", "polish_epochs"):
        asked = getattr(arguments, name)
        setattr(
            own,
            name,
            [STEPS if e else 0 for e in asked]
            if isinstance(asked, list)
            else STEPS
            if asked
            else 0,
        )
    own.early_stop_patience = own.checkpoint_steps = 0
    own.checkpoint_minutes = 0.0
    own.overfit_gate = own.overwrite = own.resume = own.keep_start = False
    own.hidden_state_pictures = own.keep_activations = False
    own.audit_tokens = min(arguments.audit_tokens, batch["input_ids"].numel())
    with tempfile.TemporaryDirectory() as folder:
        own.output_dir = str(Path(folder) / "run")
        trainer = build_trainer(own, teacher, copy.deepcopy(student), [batch], None, device)
        trainer.show_progress = False
        with few_threads(teacher.model):
            results = train(trainer, own)
        audit = Path(own.output_dir) / "audit.json"
        levels = json.loads(audit.read_text())["levels"] if audit.is_file() else []
    rows = [*results["blocks"], *(results[name] for name in ("head", "polish") if results[name])]
    losses = [
        DryLoss(row["stage"], row["first_loss"], row["last_loss"]) for row in rows if row["steps"]
    ]
    return DrySteps(losses, about_states(levels, own))


@contextmanager
def few_threads(model: "nn.Module") -> Iterator[None]:
    """One thread for a small model: several wait for each other where others use the cores."""
    import torch

    from cleangpt.structure import count_parameters

    before = torch.get_num_threads()
    if count_parameters(model) < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def about_states(levels: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """What the teacher's states ask for, of what the flags do not do yet."""
    massive = sorted({channel for level in levels for channel in level["massive_channels"]})
    first = max((level["first_position_ratio"] or 0.0 for level in levels), default=0.0)
    if arguments.distill_loss_type in _RAW_LOSSES and massive:
        return (
            f"The teacher's channels {', '.join(map(str, massive[:5]))} are massive and rule"
            f" {arguments.distill_loss_type}: choose --distill_loss_type nmse."
        )
    if first > FIRST_POSITION_IS_HUGE and not arguments.first_hidden_position:
        return (
            f"The first token of a window has states {first:.0f} times as long as the others:"
            " consider --first_hidden_position 1."
        )
    return ""
