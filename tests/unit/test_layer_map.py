import itertools

import pytest
from hypothesis import given, strategies as st

from cleangpt.errors import UsageError
from distillation.layer_map import (
    LAYER_MAPS,
    choose_blocks,
    choose_layer_map,
    uniform_layer_map,
)


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


@given(teacher=st.integers(1, 40), extra=st.integers(1, 60))
def test_a_deeper_student_shares_the_teachers_blocks_evenly(teacher: int, extra: int) -> None:
    layer_map = uniform_layer_map(teacher + extra, teacher)
    shares = [layer_map.count(block) for block in range(teacher)]
    assert list(layer_map) == sorted(layer_map)
    assert sum(shares) == teacher + extra
    assert max(shares) - min(shares) <= 1


def test_no_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match="0 blocks and the teacher 4") as error:
        uniform_layer_map(0, 4)
    assert "n_layer >= 1" in error.value.remedy


def test_named_maps_are_the_two_ends() -> None:
    assert choose_layer_map("first", 3, 8) == (0, 1, 2)
    assert choose_layer_map("last", 3, 8) == (5, 6, 7)
    assert choose_layer_map("uniform", 3, 8) == uniform_layer_map(3, 8)
    assert {choose_layer_map(name, 4, 4) for name in LAYER_MAPS} == {(0, 1, 2, 3)}
    deeper = [choose_layer_map(name, 5, 3) for name in LAYER_MAPS]
    assert deeper == [(0, 0, 1, 2, 2), (0, 1, 2, 2, 2), (0, 0, 0, 1, 2)]


def test_a_map_of_ones_own() -> None:
    assert choose_layer_map([0, 2, 7], 3, 8) == (0, 2, 7)
    assert choose_layer_map([0, 2, 2], 3, 8) == (0, 2, 2)
    assert choose_layer_map([0, 0, 1, 1], 4, 2) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("wanted", "cause"),
    [
        ([0, 1], "it has 2 entries for 3 student blocks"),
        ([0, 1, 8], r"the teacher's blocks are 0 to 7, and it names \[8\]"),
        ([-1, 1, 2], r"names \[-1\]"),
        ([2, 1, 5], "it falls from 2 to 1"),
        ([2, 5, 4], "it falls from 5 to 4"),
    ],
)
def test_bad_maps_are_refused_with_one_that_fits(wanted: list[int], cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as error:
        choose_layer_map(wanted, 3, 8)
    assert "such as 2,4,7" in error.value.remedy


def test_blocks_that_learn() -> None:
    assert choose_blocks(None, 3) == {0, 1, 2}
    assert choose_blocks([2, 0], 3) == {0, 2}
    for wanted, found in (([3], r"names \[3\]"), ([-1], "names"), ([], "names none")):
        with pytest.raises(UsageError, match=f"The student's blocks are 0 to 2; .*{found}"):
            choose_blocks(wanted, 3)
    with pytest.raises(UsageError, match=r"names \[1\] twice") as error:
        choose_blocks([0, 1, 2, 1], 3)
    assert error.value.exit_code == 2
