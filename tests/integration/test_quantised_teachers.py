"""Teachers stored quantised in a folder: unpacked where transformers can, refused in words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cleangpt.errors import EnvironmentProblem
from cleangpt.teacher import load_teacher
from tests.saved_teachers import build, save

SIDE = 16


def say_quantised(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))


def eight_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of float8 numbers, and what each block is to be multiplied with."""
    blocks = weight.unflatten(0, (-1, SIDE)).unflatten(2, (-1, SIDE))
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    small = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return small.to(torch.float8_e4m3fn), scale


def test_a_folder_of_eight_bit_floats_becomes_plain_numbers(tmp_path: Path) -> None:
    name = save(tmp_path / "fp8", build("llama"))
    file = tmp_path / "fp8" / "model.safetensors"
    stored = load_file(file)
    expected = dict(stored)
    for key in [key for key in stored if key.endswith("_proj.weight")]:
        stored[key], scale = eight_bits(stored[key])
        stored[f"{key}_scale_inv"] = scale
        spread = scale.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)
        expected[key] = stored[key].float() * spread
    save_file(stored, file, metadata={"format": "pt"})
    say_quantised(tmp_path / "fp8", quant_method="fp8", weight_block_size=[SIDE, SIDE])
    teacher = load_teacher(name)
    own = teacher.model.state_dict()
    for key, weight in expected.items():
        torch.testing.assert_close(own[key], weight, rtol=1e-2, atol=1e-4)
    assert teacher.model.dtype == torch.float32
    assert not hasattr(teacher.model.config, "quantization_config")


@pytest.mark.parametrize(
    ("kind", "package"), [("gptq", "optimum"), ("torchao", "torchao"), ("bitsandbytes", "bitsand")]
)
def test_a_format_whose_package_is_missing_names_it(
    kind: str, package: str, tmp_path: Path
) -> None:
    import importlib.util

    if importlib.util.find_spec(kind) is not None:
        pytest.skip(f"{kind} is installed")
    name = save(tmp_path / kind, build("llama"))
    settings: dict[str, Any] = {"bits": 4} if kind == "gptq" else {"load_in_8bit": True}
    if kind == "torchao":
        settings = {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
    say_quantised(tmp_path / kind, quant_method=kind, **settings)
    with pytest.raises(EnvironmentProblem, match=package) as caught:
        load_teacher(name)
    assert f"is stored quantised ({kind})" in caught.value.cause
    assert "GGUF" in caught.value.remedy
    assert caught.value.exit_code == 5
    assert len(str(caught.value).splitlines()) == 2
