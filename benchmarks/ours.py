"""The library's own training, timed: what a user calls, with all that happens around the steps."""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillation import DistillationTrainer
from distillation.trainers import BackboneDistillationTrainer

PRECISIONS = ("fp32", "auto")
"""What is measured: exact float32, and what the library chooses by itself, its default."""


@dataclass(frozen=True)
class OurRun:
    """One run of the library.

    Args:
        student: The trained student.
        backbone_seconds: Wall time of ``train_backbone``: the store's filling, the advance of both
            sides, the loader, optimizers, hashes, checks and files.
        head_seconds: Wall time of ``train_head``; 0 without one.
        blocks: The trainer's row of each block.
        head: The trainer's row of the head; None without one.
        total_seconds: Wall time of the whole call, saving the student included.
    """

    student: Any
    backbone_seconds: float
    head_seconds: float
    blocks: list[dict[str, Any]]
    head: dict[str, Any] | None = None
    total_seconds: float = 0.0


def train_our_backbone(
    teacher: Any, start: Any, loader: Any, *, epochs: Any, lr: float, **options: Any
) -> OurRun:
    """Train all blocks of a copy of ``start`` with the backbone trainer.

    Args:
        teacher: The model that is imitated.
        start: The student to copy.
        loader: The data.
        epochs: Passes per block; a number or one per block.
        lr: Peak learning rate.
        **options: Keyword-only settings of the trainer.
    """
    student = copy.deepcopy(start)
    with tempfile.TemporaryDirectory() as folder:
        trainer = BackboneDistillationTrainer(
            teacher, student, None, loader, **where(student, folder), **options
        )
        seconds, results = timed(lambda: trainer.train_backbone(epochs, lr))
    return OurRun(student, seconds, 0.0, results["blocks"])


def train_ours(
    teacher: Any,
    start: Any,
    loader: Any,
    *,
    epochs: Any,
    lr: float,
    head_epochs: int,
    head_lr: float,
    **options: Any,
) -> OurRun:
    """Train backbone and head of a copy of ``start`` with the whole trainer.

    The head starts from the embeddings, as the naive one does, and not from its least-squares fit.
    """
    student = copy.deepcopy(start)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            teacher, student, None, loader, **where(student, folder), **options
        )
        phases: list[tuple[Any, str]] = [
            (trainer.backbone_trainer, "train_backbone"),
            (trainer.head_trainer, "train_head"),
        ]
        for phase, method in phases:
            setattr(phase, method, keep_time(getattr(phase, method), method, seconds))
        started_at = time.perf_counter()
        results = trainer.train(
            epochs,
            lr,
            lm_head_epochs=head_epochs,
            lm_head_lr=head_lr,
            initialize_head_from_teacher=False,
        )
        total_seconds = time.perf_counter() - started_at
    return OurRun(
        student,
        seconds["train_backbone"],
        seconds["train_head"],
        results["blocks"],
        results["head"],
        total_seconds,
    )


def where(student: Any, folder: str) -> dict[str, Any]:
    """The keywords that say on which device and in which directory a trainer works.

    No audit of the teacher: the naive loops make none either.
    """
    device = next(student.parameters()).device
    return {"device": device, "output_dir": Path(folder) / "run", "audit_tokens": 0}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that ``work`` takes, and its result."""
    started_at = time.perf_counter()
    result = work()
    return time.perf_counter() - started_at, result


def keep_time(
    method: Callable[..., Any], name: str, seconds: dict[str, float]
) -> Callable[..., Any]:
    """The same method, which writes its wall time under ``name``."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seconds[name], result = timed(lambda: method(*args, **kwargs))
        return result

    return wrapped
