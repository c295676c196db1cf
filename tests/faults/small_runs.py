"""What the fault tests share: a run of a second in which something happens, and real limits."""

import json
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cleangpt.checkpoints import Checkpoint, Checkpoints
from tests.builders import batches, tiny_student, tiny_teacher

TRAINING: dict[str, Any] = {"epochs_per_block": 1, "lr_per_block": 1e-2, "polish_epochs": 1}
STEPS = 4 * 4
"""Of a small run: two blocks, the head and the polish, on four batches."""


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """Lower a limit of this process, such as RLIMIT_FSIZE, inside the block."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def file_size_limit(soft: int) -> Any:
    """No file can grow beyond so many bytes: what a full disk is to a program, without a disk."""
    return limited(resource.RLIMIT_FSIZE, soft)


def doing(what: Callable[[], object], at_step: int, kind: Any = torch.optim.AdamW) -> Any:
    """Optimizers that do something right after a step of the run, counted from 1."""
    count = [0]

    def stepped(*_: Any) -> None:
        count[0] += 1
        if count[0] == at_step:
            what()

    def make(groups: Any, lr: float) -> Any:
        optimizer = kind(groups, lr=lr)
        optimizer.register_step_post_hook(stepped)
        return optimizer

    return make


def small_trainer(
    folder: Path, what: Callable[[], object] = lambda: None, at_step: int = 0, **options: Any
) -> Any:
    """A trainer whose run does ``what`` after a step; its settings are always the same."""
    from distillation import DistillationTrainer

    return DistillationTrainer(
        options.pop("teacher", None) or tiny_teacher(),
        options.pop("student", None) or tiny_student(),
        None,
        options.pop("data", None) or batches(4),
        output_dir=folder / "run",
        optimizer_cls=doing(what, at_step),
        **{"precision": "fp32", "log_interval": 1, "resume": True, **options},
    )


def send_sigterm() -> None:
    """What a scheduler sends before it takes the machine away."""
    os.kill(os.getpid(), signal.SIGTERM)


class SignalsAt(logging.Handler):
    """Sends this process a signal when a line of the log has certain words."""

    def __init__(self, words: str, number: int) -> None:
        super().__init__()
        self.words, self.number = words, number
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self.words in record.getMessage() and not self.count:
            self.count += 1
            os.kill(os.getpid(), self.number)


@contextmanager
def signal_at(words: str, number: int = signal.SIGTERM) -> Iterator[SignalsAt]:
    """Send this process a signal at a line of the log inside the block."""
    handler, root = SignalsAt(words, number), logging.getLogger()
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of the run in ``folder / "run"`` that verifies."""
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    return Checkpoints(folder / "run" / "checkpoints", manifest["run_id"], writes=False).newest()


def equal_weights(one: Any, other: Any) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    state, own = one.state_dict(), other.state_dict()
    return state.keys() == own.keys() and all(torch.equal(state[n], own[n]) for n in state)
