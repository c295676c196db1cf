import math

import pytest

from cleangpt.errors import UsageError
from distillation.config import DistillationConfig, StageSettings, block_settings


def settings(**changes: object) -> list[StageSettings]:
    values: dict[str, object] = {
        "epochs_per_block": 3,
        "lr_per_block": 1e-3,
        "wd_per_block": 0.01,
        "max_grad_norm_per_block": 1.0,
        **changes,
    }
    return block_settings(2, **values)  # type: ignore[arg-type]


def test_numbers_are_spread_and_lists_are_kept() -> None:
    first, second = settings(lr_per_block=[1e-3, 5e-4], wd_per_block=(0.0, 0.1))
    assert (first.lr, second.lr) == (1e-3, 5e-4)
    assert (first.weight_decay, second.weight_decay) == (0.0, 0.1)
    assert first.epochs == second.epochs == 3


@pytest.mark.parametrize(
    "name", ["epochs_per_block", "lr_per_block", "wd_per_block", "max_grad_norm_per_block"]
)
def test_a_list_of_the_wrong_length_is_refused(name: str) -> None:
    one = 1 if name == "epochs_per_block" else 1.0
    with pytest.raises(UsageError, match=f"{name} has 3 entries, and the student has 2 blocks"):
        settings(**{name: [one, one, one]})


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("epochs_per_block", -1, "epochs=-1"),
        ("lr_per_block", 0.0, "lr=0.0"),
        ("lr_per_block", math.nan, "lr=nan"),
        ("wd_per_block", -0.1, "weight_decay=-0.1"),
        ("max_grad_norm_per_block", 0.0, "max_grad_norm=0.0"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float, rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        settings(**{name: value})


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(UsageError) as error:
        DistillationConfig(
            distill_loss_type="mae", logit_loss_temperature=0.0, warmup_ratio=1.0, log_interval=0
        )
    for name in ("distill_loss_type", "logit_loss_temperature", "warmup_ratio", "log_interval"):
        assert name in error.value.cause
        assert name in error.value.remedy
    assert error.value.exit_code == 2
