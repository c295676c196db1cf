"""Sliding windows: every token is scored once, with as much context as there is."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from distillation.evaluation.scoring_windows import plan_windows, window_batches


@given(st.integers(2, 200), st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=100)
def test_every_token_is_scored_once_with_long_context(
    num_tokens: int, seq_len: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len))
    scored: list[int] = []
    for window in plan_windows(num_tokens, seq_len, stride):
        assert 0 <= window.start <= window.first_scored < window.end <= num_tokens - 1
        assert window.end - window.start <= seq_len
        for position in range(window.first_scored, window.end):
            target = position + 1
            context = target - window.start
            assert context >= min(target, seq_len - stride + 1)
            scored.append(target)
    assert scored == list(range(1, num_tokens))


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 5), st.data())
@settings(deadline=None, max_examples=50)
def test_batches_hold_the_targets_once(
    num_tokens: int, seq_len: int, batch_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len))
    ids = list(range(100, 100 + num_tokens))
    batches = list(window_batches(ids, plan_windows(num_tokens, seq_len, stride), batch_size))
    targets = torch.cat([batch.targets[batch.scored] for batch in batches])
    assert sorted(targets.tolist()) == ids[1:]
    for batch in batches:
        assert not (batch.scored & ~batch.valid).any()
        assert torch.equal(batch.targets[batch.valid], batch.input_ids[batch.valid] + 1)


def test_the_drawing_in_the_module() -> None:
    windows = plan_windows(8, seq_len=4, stride=2)
    assert [(w.start, w.end, w.first_scored) for w in windows] == [(0, 4, 0), (2, 6, 4), (3, 7, 6)]


@pytest.mark.parametrize("stride", [0, 5])
def test_a_stride_that_skips_or_stands_still_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        plan_windows(10, seq_len=4, stride=stride)


def test_worker_processes_give_the_same_batches() -> None:
    windows = plan_windows(30, 8, 4)
    one = list(window_batches(range(30), windows, 2))
    two = list(window_batches(range(30), windows, 2, num_workers=1))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one, two, strict=True))
