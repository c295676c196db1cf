"""How the machine's rates are measured."""

from collections.abc import Callable

import pytest

from distillation import probe


def test_works_take_turns_and_each_counts_at_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment in which the machine does something else meets all of them, and no result."""
    done: list[str] = []
    now = [0.0]
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])

    def work(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            is_busy = len(done) in (2, 3)  # the first round that counts
            done.append(name)
            now[0] += seconds * (10 if is_busy else 1)

        return run

    found = probe.shortest({"long": work("long", 0.02), "short": work("short", 0.01)})
    assert found == pytest.approx({"long": 0.02, "short": 0.01})
    assert done == ["long", "short"] * (len(done) // 2)
    assert len(done) > 4
