import itertools

import pytest
from hypothesis import given, strategies as st

from cleangpt.errors import UsageError
from distillation.layer_map import uniform_layer_map


@given(student=st.integers(1, 40), extra=st.integers(0, 60))
def test_maps_rise_and_end_at_the_last_block(student: int, extra: int) -> None:
    layer_map = uniform_layer_map(student, student + extra)
    assert len(layer_map) == student
    assert layer_map[-1] == student + extra - 1
    assert all(a < b for a, b in itertools.pairwise(layer_map))
    assert layer_map[0] >= 0


def test_equal_depth_is_the_identity() -> None:
    assert uniform_layer_map(12, 12) == tuple(range(12))
    assert uniform_layer_map(2, 12) == (5, 11)


@pytest.mark.parametrize(("student", "teacher"), [(0, 4), (5, 4)])
def test_impossible_depths_are_refused(student: int, teacher: int) -> None:
    with pytest.raises(UsageError, match=f"{student} blocks and the teacher {teacher}") as error:
        uniform_layer_map(student, teacher)
    assert "n_layer between 1 and 4" in error.value.remedy
