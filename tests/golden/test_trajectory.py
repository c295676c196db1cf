"""Twenty steps give the recorded losses and gradient norms, within rounding."""

import json

import pytest

from tests.golden.record import GOLDEN, trajectory

POINT, DRIFT = 1e-3, 1e-4  # the CPU's other instruction sets differ by some 1e-6


def test_losses_and_gradient_norms_are_the_recorded_ones() -> None:
    """Both: Adam hides a wrong gradient scale from the loss."""
    recorded = json.loads(GOLDEN.read_text())["steps"]
    found = trajectory()
    assert [(s["stage"], s["step"]) for s in found] == [(s["stage"], s["step"]) for s in recorded]
    for name in ("loss", "gradient_norm"):
        ratios = [f[name] / r[name] for f, r in zip(found, recorded, strict=True)]
        assert ratios == pytest.approx([1.0] * len(ratios), abs=POINT)
        assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=DRIFT)
