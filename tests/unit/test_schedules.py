import pytest

from cleangpt.schedules import SCHEDULES, learning_rate_factor


def curve(schedule: str, total: int = 100, warmup: float = 0.1, end: float = 0.1) -> list[float]:
    return [
        learning_rate_factor(step, total, schedule=schedule, warmup_ratio=warmup, min_lr_ratio=end)
        for step in range(total)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_to_the_peak(schedule: str) -> None:
    factors = curve(schedule)
    assert factors[:10] == sorted(factors[:10])
    assert 0 < factors[0] < 0.2
    assert factors[10] == 1.0


def test_the_end_of_each_schedule() -> None:
    assert curve("constant")[-1] == 1.0
    for schedule in ("cosine", "linear"):
        factors = curve(schedule)
        assert factors[-1] == pytest.approx(0.1)
        assert factors[10:] == sorted(factors[10:], reverse=True)


def test_a_loader_longer_than_promised_stays_at_the_end() -> None:
    late = learning_rate_factor(150, 100, schedule="cosine", warmup_ratio=0.0, min_lr_ratio=0.1)
    assert late == pytest.approx(0.1)


def test_one_step_is_at_the_peak() -> None:
    for schedule in SCHEDULES:
        assert curve(schedule, total=1, warmup=0.05) == [1.0]


def test_an_unknown_schedule_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'step'; known: constant, cosine, linear"):
        curve("step")
