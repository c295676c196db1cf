"""What only an accelerator can show: ``pytest -m gpu``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from distillation.trainers.stage_group import StageGroup
from tests.builders import STUDENTS, batches, tiny_student, tiny_teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(place: Path, kind: str = "Vanilla", **options: Any) -> tuple[list[float], float]:
    from distillation import DistillationTrainer

    trainer = DistillationTrainer(
        tiny_teacher(),
        tiny_student(kind),
        None,
        batches(),
        device=torch.device("cuda"),
        output_dir=place,
        **options,
    )
    results = trainer.train(2, 1e-2, lm_head_epochs=2, lm_head_lr=1e-2)
    return results["backbone_losses"], results["head_loss"]


@pytest.mark.parametrize("kind", STUDENTS)
def test_kept_states_give_the_losses_of_computed_ones(tmp_path: Path, kind: str) -> None:
    kept, streamed = (
        run(tmp_path / cache, kind, activation_cache=cache, precision="fp32")
        for cache in ("ram", "off")
    )
    assert kept[0] == pytest.approx(streamed[0], rel=1e-5)
    assert kept[1] == pytest.approx(streamed[1], rel=1e-5)


def test_a_compiled_logit_loss_gives_the_losses_of_the_plain_one(tmp_path: Path) -> None:
    plain, fused = (
        run(tmp_path / str(wanted), compile_blocks=wanted, precision="fp32")
        for wanted in (False, True)
    )
    assert fused[0] == pytest.approx(plain[0], rel=1e-4)
    assert fused[1] == pytest.approx(plain[1], rel=1e-4)


def test_the_gpu_trains_to_the_losses_of_the_cpu(tmp_path: Path) -> None:
    from tests.builders import backbone_trainer

    options: dict[str, Any] = {"precision": "fp32"}
    here = backbone_trainer(tmp_path / "cpu", **options).train_backbone(2, 1e-2)
    there = run(tmp_path / "cuda", **options)[0]
    assert there == pytest.approx(here["backbone_losses"], rel=1e-3)


def test_auto_chooses_bf16_and_trains(tmp_path: Path) -> None:
    from cleangpt.runtime.precision import choose_precision

    assert choose_precision("auto", torch.device("cuda"), 32).name == "bf16"
    half, exact = run(tmp_path / "a"), run(tmp_path / "b", precision="fp32")
    assert half[0] == pytest.approx(exact[0], rel=0.05)


@contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    from distillation.batch import as_batch
    from distillation.config import StageSettings
    from distillation.trainers.stage_loop import StageLoop, build_optimizer
    from tests.builders import backbone_trainer

    device = torch.device("cuda")
    trainer = backbone_trainer(tmp_path, device=device, use_stitching_layers=True)
    trainer.teacher_model.to(device)
    trainer.student_model.to(device)
    trainer.stitches = trainer._new_stitches()
    stage = trainer._stage(1, trainer.activations)
    settings = StageSettings(epochs=1, lr=1e-3)
    StageGroup(trainer, "block-01", [stage], [settings])  # puts models into their modes
    optimizer = build_optimizer(torch.optim.AdamW, stage, settings)
    loop = StageLoop(
        stage, trainer.config, settings, optimizer, 10, trainer.precision, trainer.ranks
    )
    batch = as_batch(batches(1)[0], device)
    loop.step([batch], [batch])  # the first step allocates and looks at the model
    with no_host_sync():
        loop.step([batch], [batch])
    loop._gather()
    assert loop.result.steps == 2
