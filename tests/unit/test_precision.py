"""Which precision a run gets, and why."""

from pathlib import Path

import pytest
import torch

from cleangpt.errors import UsageError
from cleangpt.runtime import precision
from cleangpt.runtime.precision import bf16_speed_up, choose_precision
from tests.builders import backbone_trainer, tiny_student, unchanged, weights_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_what_is_asked_for_is_used(asked: str) -> None:
    assert choose_precision(asked, CPU, 8).name == asked


@pytest.mark.parametrize(("speed_up", "name"), [(0.5, "fp32"), (1.2, "fp32"), (2.0, "bf16")])
def test_auto_follows_the_measurement_and_states_it(
    speed_up: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bf16_speed_up", lambda width: speed_up)
    chosen = choose_precision("auto", CPU, 512)
    assert chosen.name == name
    assert f"{speed_up:.2g} times" in chosen.reason
    assert choose_precision("auto", CPU, 64).name == "fp32"


def test_the_measurement_is_real_and_leaves_the_generators_alone() -> None:
    state = torch.get_rng_state()
    bf16_speed_up.cache_clear()
    assert 0.01 < bf16_speed_up(256) < 100
    assert bf16_speed_up(256) == bf16_speed_up(256)
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(UsageError, match="auto, fp32, bf16"):
        choose_precision("fp16", CPU, 8)
    with pytest.raises(UsageError, match="precision"):
        backbone_trainer(Path("nowhere"), precision="half")


def test_bf16_trains_to_nearly_the_same_losses_with_float32_parameters(tmp_path: Path) -> None:
    def run(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        student = tiny_student(n_layer=3)
        trainer = backbone_trainer(tmp_path / name, student, precision=name)
        return trainer.train_backbone(2, 1e-2)["backbone_losses"], weights_of(student)

    (exact, exact_weights), (half, half_weights) = run("fp32"), run("bf16")
    assert half == pytest.approx(exact, rel=0.03)
    assert half != exact
    assert all(tensor.dtype == torch.float32 for tensor in half_weights.values())
    trained = [name for name in exact_weights if name.startswith("blocks.")]
    assert not any(name in unchanged(exact_weights, half_weights) for name in trained)


def test_tf32_is_for_bf16_runs_on_a_gpu_and_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    for name, device, inside in (
        ("bf16", "cuda", "high"),
        ("bf16", "cpu", before),
        ("fp32", "cuda", before),
    ):
        with precision.Precision(name, "").tensor_cores(torch.device(device)):
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == before
