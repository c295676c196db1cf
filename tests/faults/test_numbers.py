"""Numbers (N03 and N11 of docs/faults.md): NaN is found on loading, and spikes are told."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cleangpt.checkpoints import Checkpoint, Checkpoints
from cleangpt.errors import CheckpointError, InputError
from cleangpt.integrity import SEAL, sealed
from cleangpt.runtime.module_state import tensors_fingerprint
from distillation.fit_statistics import FitStatistics
from distillation.trainers.loss_watch import MEMORY, LossWatch
from distillation.utils import load_checkpoint, save_checkpoint
from tests.builders import backbone_trainer, batches, tiny_student
from tests.faults.small_runs import TRAINING, small_trainer


def test_a_teacher_is_read_whole_and_not_only_where_a_probe_looks(tmp_path: Path) -> None:
    from cleangpt.teacher import load_teacher
    from tests.saved_teachers import build, save

    model: Any = build("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[60, 3] = float("inf")  # a probe is eight tokens long
    name = save(tmp_path / "broken", model)
    with pytest.raises(
        InputError, match=r"NaN or infinite .*first is transformer\.wpe\.weight"
    ) as error:
        load_teacher(name)
    assert error.value.exit_code == 3


def test_a_checkpoint_that_was_edited_to_hold_nan_is_refused(tmp_path: Path) -> None:
    """Its checksums are right: whoever edits weights can edit those too."""
    checkpoints = Checkpoints(tmp_path, "ab" * 16)
    folder = checkpoints.save(Checkpoint(1, {"w": torch.ones(3)}, {}))
    path = folder / "tensors.safetensors"
    save_file({"w": load_file(path)["w"] * torch.nan}, path)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="1 tensors hold NaN .* first is w") as error:
        checkpoints.newest()
    assert error.value.exit_code == 4


def test_a_student_file_with_nan_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tiny_student(), tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    state = content["model_state_dict"]
    state["wpe.weight"][2, 1] = torch.nan
    about = {k: v for k, v in json.loads(content["metadata"]).items() if k != SEAL}
    metadata = json.dumps(sealed(about, tensors_fingerprint(state.items())))
    torch.save({"model_state_dict": state, "metadata": metadata}, path)
    with pytest.raises(CheckpointError, match=r"NaN or infinite numbers, the first is wpe\.weight"):
        load_checkpoint(path)


def said(losses: list[float]) -> list[str]:
    watch = LossWatch()
    return [text for text in map(watch.seen, losses) if text]


def test_a_loss_that_jumps_and_one_that_drifts_are_told_once_each() -> None:
    calm = [3.0 + 0.5 * (step % 3) for step in range(200)]
    assert said(calm) == []
    assert said([2.0 / (1 + step / 10) for step in range(300)]) == []
    spikes = said([*calm[:50], 90.0, *calm[50:], 90.0])
    assert len(spikes) == 1
    assert spikes[0].startswith("the loss is 90, and its recent mean 3.")
    drift = said([1.0 * 1.03**step for step in range(150)])
    assert len(drift) == 1
    assert "the stage diverges" in drift[0]
    assert said([1e-14 * (1 + 100 * (step % 7 == 0)) for step in range(100)]) == []
    assert said([100.0, *calm[:MEMORY]]) == []


@pytest.mark.slow
def test_a_diverging_stage_is_told_and_its_rate_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rates: list[float] = []

    def optimizer(groups: Any, lr: float) -> Any:
        made = torch.optim.SGD(groups, lr=lr)
        made.register_step_post_hook(lambda *_: rates.append(made.param_groups[0]["lr"]))
        return made

    options = {"lr_schedule": "constant", "warmup_ratio": 0.0, "optimizer_cls": optimizer}
    student = tiny_student(n_layer=1)
    trainer = backbone_trainer(tmp_path, student, batches(2), **options)
    good, calls = trainer.hidden_state_loss_fn, [0]

    def growing(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        factor: float = 1.05 ** calls[0]
        return good(student, teacher) * factor

    trainer.hidden_state_loss_fn = growing
    with caplog.at_level(logging.WARNING):
        trainer.train_backbone(40, 1e-4)
    assert caplog.text.count("the stage diverges. The learning rate stays as it is") == 1
    assert set(rates) == {1e-4}


def test_a_batch_that_is_skipped_stops_no_checkpoint_and_counts_in_no_error(tmp_path: Path) -> None:
    own = small_trainer(tmp_path, checkpoint_steps=1)
    calls = [0]

    def nan_once(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return torch.nn.functional.mse_loss(student, teacher) * (
            float("nan") if calls[0] == 2 else 1.0
        )

    own.backbone_trainer.hidden_state_loss_fn = nan_once
    rows = own.train(**TRAINING)["blocks"]
    assert [row["skipped"] for row in rows] == [1, 0]
    assert all(row["relative_error"] > 0 for row in rows)


def test_states_that_are_not_finite_count_in_no_error() -> None:
    fit = FitStatistics.empty(4, torch.device("cpu"))
    target = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    fit.add(target + 0.1, target)
    alone = fit.relative_error()
    fit.add(torch.full_like(target, torch.nan), target)
    assert fit.relative_error() == alone
    assert int(fit.count) == 6
