from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stitching_layers import (
    StitchingLayer,
    StitchingLayers,
    load_stitches,
    stitches_to_bytes,
)


def test_equal_widths_start_as_the_identity() -> None:
    states = torch.randn(3, 4, 8)
    torch.testing.assert_close(StitchingLayer(8, 8)(states), states)


def test_other_widths_start_small_with_zero_bias() -> None:
    stitch = StitchingLayer(4, 8)
    assert stitch(torch.zeros(2, 4)).abs().max() == 0
    assert stitch(torch.randn(2, 3, 4)).shape == (2, 3, 8)
    assert StitchingLayer(4, 8, bias=False).projection.bias is None


@pytest.mark.parametrize("bias", [True, False])
def test_saved_stitches_come_back(tmp_path: Path, bias: bool) -> None:
    stitches = StitchingLayers((1, 3), 4, 8, bias)
    (tmp_path / "stitching_layers.safetensors").write_bytes(stitches_to_bytes(stitches))
    for place in (tmp_path, tmp_path / "stitching_layers.safetensors"):
        loaded = load_stitches(place)
        assert loaded.layer_map == (1, 3)
        assert loaded.state_dict().keys() == stitches.state_dict().keys()
        states = torch.randn(5, 4)
        assert all(torch.equal(a(states), b(states)) for a, b in zip(loaded, stitches, strict=True))
    assert stitches_to_bytes(stitches) == stitches_to_bytes(stitches)


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no stitching layers"):
        load_stitches(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold stitching layers"):
        load_stitches(tmp_path / "other.safetensors")
