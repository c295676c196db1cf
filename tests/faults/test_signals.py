"""Runs in other threads, the clock, and fault points that are misspelt."""

import logging
import re
import signal
import threading
from pathlib import Path

import pytest

from cleangpt.errors import UsageError
from cleangpt.run_directory import RunDirectory
from cleangpt.runtime.faultpoints import FAULT_POINTS, VARIABLE, faultpoint
from cleangpt.runtime.stopping import StopRequest
from tests.contract.source_tree import ROOT, shipped_files


def test_a_run_in_a_thread_says_once_that_signals_do_not_save_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    entered = []

    def run() -> None:
        with StopRequest().listening():
            entered.append(signal.getsignal(signal.SIGTERM))

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert entered == [before]
    assert caplog.text.count("Signals reach the main thread alone") == 1


def test_no_name_and_no_decision_hangs_on_the_clock(tmp_path: Path) -> None:
    """Two runs in one second, and a clock that jumps, change nothing: only durations are read."""
    wall = re.compile(r"\btime\.time\(|\b(now|today|utcnow)\(|\bstrftime\b|\blocaltime\b")
    training = [f for f in shipped_files() if f.package in ("cleangpt", "distillation")]
    users = [f.name for f in training if wall.search(f.text) and "evaluation" not in f.name]
    # It alone: by their age it tells what a killed process left from what is being written.
    assert users == ["cleangpt/data/token_cache.py"]
    assert RunDirectory(tmp_path).run_id != RunDirectory(tmp_path).run_id


def test_fault_points_in_the_code_are_those_that_are_described(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = {n for f in shipped_files() for n in re.findall(r'faultpoint\("([^"]+)"', f.text)}
    assert used == set(FAULT_POINTS)
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert [name for name in FAULT_POINTS if f"`{name}`" not in page] == []
    faultpoint("run.done")  # nothing is asked for
    for plan in ("run.don:1:SIGTERM", "run.done:x:SIGTERM", "run.done:1:TERM", "run.done", ""):
        monkeypatch.setenv(VARIABLE, plan)
        with pytest.raises(UsageError, match=r"is no fault point.*\n.*checkpoint\.before_rename"):
            faultpoint("run.done")


def test_a_fault_point_counts_its_passes_or_takes_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = StopRequest()
    with stop.listening():
        monkeypatch.setenv(VARIABLE, "step.taken:7:SIGTERM,store.kept:2:SIGTERM")
        faultpoint("store.kept")
        faultpoint("store.computed")
        faultpoint("step.taken", 6)
        assert stop.signal is None
        faultpoint("step.taken", 7)
        assert stop.signal == signal.SIGTERM
    with stop.listening():
        faultpoint("store.kept")
        assert stop.signal == signal.SIGTERM
