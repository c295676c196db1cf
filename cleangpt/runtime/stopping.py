"""SIGTERM and Ctrl-C ask a run to stop; it finishes its step and saves.

Before a run has begun, and in an evaluation, there is nothing to save: there SIGTERM ends a command
as Ctrl-C does, by an exception that lets everything be put in order. Handlers can only be set in
the main thread: elsewhere, as in some notebooks, signals do what they always do. A second Ctrl-C
interrupts at once.
"""

import logging
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

_SECONDS_TO_END = 10.0


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception in the main thread."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated` inside the block, once, unless somebody handles it."""
    if not _is_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what puts things in order is left alone
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def held_back() -> Iterator[None]:
    """Let signals wait until the block is over, for files that belong together."""
    if not _is_main_thread():
        yield
        return
    request = StopRequest()
    try:
        with request.listening():
            yield
    finally:
        if request.signal is not None:
            signal.raise_signal(request.signal)


def end_children() -> None:
    """Kill this process's children, for good: one that hangs ignores what ends it at exit.

    PyTorch takes the end of a loader's worker for a fault and raises wherever this process is, so
    nobody is told of these.
    """
    told = signal.getsignal(signal.SIGCHLD)
    is_told = _is_main_thread() and told is not None  # None is a handler that is not Python's
    if is_told:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        children = multiprocessing.active_children()
        for child in children:
            child.kill()
        for child in children:
            child.join(_SECONDS_TO_END)
    finally:
        if is_told:
            signal.signal(signal.SIGCHLD, told)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class StopRequest:
    """Whether a signal has asked to stop, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as requests inside the block."""
        if not _is_main_thread():
            logger.warning(
                "Signals reach the main thread alone, and this run is in another one: Ctrl-C and"
                " SIGTERM will not save it first. Its last checkpoint stays."
            )
            yield
            return
        names = (signal.SIGTERM, signal.SIGINT)
        before = {name: signal.getsignal(name) for name in names}
        self.signal = None
        for name in names:
            signal.signal(name, self._note)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
