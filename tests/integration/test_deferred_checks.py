"""Steps whose finiteness is checked on the device: the same bits, and the same skipping."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.errors import NonFiniteError
from tests.builders import backbone_trainer, tiny_student, unchanged, weights_of


class SometimesNan:
    """A hidden loss that is NaN at the calls it is told."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.calls = 0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.calls += 1
        factor = float("nan") if self.calls in self.bad else 1.0
        return ((student - teacher) ** 2).mean() * factor


def train(
    place: Path, bad: set[int], deferred: bool, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    from distillation.trainers import stage_group
    from distillation.trainers.stage_loop import StageLoop

    class Loop(StageLoop):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._deferred = deferred

    monkeypatch.setattr(stage_group, "StageLoop", Loop)
    student = tiny_student()
    trainer = backbone_trainer(place / str(deferred), student, **options)
    trainer.hidden_state_loss_fn = SometimesNan(bad)
    rows = trainer.train_backbone(3, 1e-2)["blocks"]
    return weights_of(student), [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


@pytest.mark.parametrize("bad", [set(), {2, 3, 15}])
def test_deferred_checks_skip_the_same_steps(
    tmp_path: Path, bad: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, rows = train(tmp_path, bad, False, monkeypatch)
    deferred, others = train(tmp_path, bad, True, monkeypatch)
    assert unchanged(at_once, deferred) == at_once.keys()
    assert rows == others
    assert sum(row["skipped"] for row in rows) == len(bad)


def test_deferred_checks_still_stop_a_broken_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NonFiniteError, match="4 batches in a row"):
        train(tmp_path, set(range(99)), True, monkeypatch, max_nonfinite_in_a_row=4)


def test_an_optimizer_without_such_a_form_is_asked_at_every_step() -> None:
    from distillation.trainers.stage_loop import skips_nonfinite_steps

    weights = [torch.nn.Parameter(torch.ones(2))]
    assert skips_nonfinite_steps(torch.optim.AdamW(weights, fused=True))
    assert not skips_nonfinite_steps(torch.optim.AdamW(weights))
    assert not skips_nonfinite_steps(torch.optim.Adagrad(weights))
