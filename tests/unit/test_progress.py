"""The time a run says is left: for the stage, and for the stages after it."""

import logging

import pytest

from cleangpt import metrics_log
from cleangpt.metrics_log import RunProgress


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_log, "time", clock)
    return clock


def said(progress: RunProgress, step: int, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        progress.show(step, 1.0, 10.0)
    return str(caplog.messages[-1])


def test_without_a_plan_all_stages_take_equally_long(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    progress = RunProgress(3, show=False)
    progress.start_stages("block-00", ["block-00"], 10)
    clock.now += 20
    line = said(progress, 5, caplog)
    assert line.startswith("block-00 (1/3) step 5/10")
    assert line.endswith("left 00:20 here, 01:40 in all")  # 20 here, and 40 for each of two
    clock.now += 20
    progress.end_stages()
    progress.skip_stages(["lm-head"])
    progress.start_stages("polish", ["polish"], 10)
    clock.now += 10
    assert said(progress, 5, caplog).endswith(
        "(3/3) step 5/10: loss 1, 10 tokens/s, left 00:10 here, 00:10 in all"
    )


def test_what_was_done_before_a_stop_is_no_measure_of_the_rest(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    progress = RunProgress(2, show=False)
    progress.start_stages("block-00", ["block-00"], 100, done=80)
    clock.now += 10
    assert said(progress, 90, caplog).endswith("left 00:10 here, 01:50 in all")
    clock.now += 10
    progress.end_stages()
    progress.start_stages("block-01", ["block-01"], 100)
    clock.now += 50
    assert said(progress, 50, caplog).endswith("left 00:50 here, 00:50 in all")


def test_a_plan_says_how_much_longer_other_stages_are(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    plan = {"block-00": 5.0, "block-01": 5.0, "polish": 100.0}
    progress = RunProgress(3, show=False, planned=plan)
    progress.start_stages("blocks", ["block-00", "block-01"], 10)
    clock.now += 10
    line = said(progress, 5, caplog)
    assert line.startswith("blocks (1-2/3) step 5/10")
    assert line.endswith("left 00:10 here, 03:30 in all")  # half as fast as planned
    clock.now += 10
    progress.end_stages()
    progress.start_stages("polish", ["polish"], 10)
    clock.now += 10
    assert said(progress, 1, caplog).endswith("left 01:30 here, 01:30 in all")


def test_stages_that_the_plan_had_no_time_for_take_what_is_planned_for_the_others(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    progress = RunProgress(2, show=False, planned={"block-00": 0.0, "block-01": 7.0})
    progress.start_stages("block-00", ["block-00"], 10)
    clock.now += 10
    assert said(progress, 5, caplog).endswith("left 00:10 here, 00:17 in all")
