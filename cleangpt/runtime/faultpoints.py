"""Named instants of a run at which a test can stop or kill it, to show that nothing is lost.

A fault point does nothing unless ``$CLEANGPT_FAULTS`` is set. Then the process sends itself a
signal where that says: ``checkpoint.before_rename:2:SIGKILL`` is the second time it passes there.
Several are separated by commas. Any program can kill itself, so nothing is given away by this.
"""

import os
import signal
from collections import Counter
from functools import cache

from cleangpt.errors import UsageError

VARIABLE = "CLEANGPT_FAULTS"
FAULT_POINTS = {
    "step.taken": "an optimizer step is done and not yet saved; its number counts the whole run",
    "stage.finished": "a stage is done and not yet saved: the hand-over to the next one",
    "stage.handed_over": "the same, once it is saved if it is to be",
    "store.computed": "frozen states were computed, and are not yet kept",
    "store.kept": "frozen states are kept",
    "checkpoint.begun": "a checkpoint's temporary folder is there, and empty",
    "checkpoint.tensors_written": "its tensors are there",
    "checkpoint.state_written": "its other file is there, and no manifest",
    "checkpoint.before_rename": "it is complete, and under its temporary name",
    "checkpoint.renamed": "it is under its final name, and not verified",
    "checkpoint.verified": "it is verified, and older ones are still there",
    "checkpoint.pruned": "older ones are deleted",
    "file.before_rename": "a file is complete, and under its temporary name",
    "file.renamed": "it is under its final name",
    "file.deleted": "a file or folder of a run that is overwritten is deleted",
    "folder.before_swap": "a folder is complete, and under its temporary name",
    "folder.removed": "the folder it replaces is deleted",
    "folder.renamed": "it is under its final name",
    "student.file_written": "the finished student is there as one file, and not for transformers",
    "student.folder_written": "it is there as both, and the run is not yet said to be done",
    "run.done": "the run is said to be done, and its checkpoints are still there",
}
"""What each fault point stands between."""

_passes: Counter[str] = Counter()


def faultpoint(name: str, number: int | None = None) -> None:
    """Fail here if ``$CLEANGPT_FAULTS`` says so.

    Args:
        name: One of ``FAULT_POINTS``.
        number: Which pass this is; None counts those of this process, from 1.

    Raises:
        UsageError: If the variable names no such point or signal.
    """
    plan = os.environ.get(VARIABLE)
    if plan is None:
        return
    _passes[name] += 1
    wanted = _read(plan).get((name, _passes[name] if number is None else number))
    if wanted is not None:
        os.kill(os.getpid(), wanted)


@cache
def _read(plan: str) -> dict[tuple[str, int], signal.Signals]:
    """By point and pass, the signal to send."""
    found: dict[tuple[str, int], signal.Signals] = {}
    for fault in plan.split(","):
        name, number, what = [*fault.split(":"), "", "", ""][:3]
        if name not in FAULT_POINTS or not number.isdecimal() or what not in _SIGNALS:
            raise UsageError(
                f"{VARIABLE} says {fault!r}, which is no fault point, number and signal.",
                f"Unset it, or write it as in {VARIABLE}=checkpoint.before_rename:2:SIGKILL; the"
                f" points are {', '.join(FAULT_POINTS)}.",
            )
        found[name, int(number)] = signal.Signals[what]
    return found


_SIGNALS = {each.name for each in signal.Signals}
