"""SIGTERM and Ctrl-C ask a run to stop; it finishes its step and saves.

Handlers can only be set in the main thread: elsewhere, as in some notebooks, signals do what they
always do. A second Ctrl-C interrupts at once.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether a signal has asked to stop, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as requests inside the block; nested blocks change nothing."""
        if threading.current_thread() is not threading.main_thread():
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
