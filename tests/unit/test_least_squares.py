"""Regression from streaming sums, against a direct solution."""

import pytest
import torch

from distillation.least_squares import LeastSquares
from tests.evaluation_samples import without_float64


def fitted(x: torch.Tensor, y: torch.Tensor, rows: int = 50) -> LeastSquares:
    sums = LeastSquares()
    for start in range(0, len(x), rows):
        sums.add(x[start : start + rows], y[start : start + rows])
    return sums


def test_it_recovers_a_linear_map_with_bias_beside_an_outlier_channel() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    x[:, 0] *= 1000  # must not drown the others
    true_weight, true_bias = torch.randn(5, 8), 100 * torch.randn(5)
    y = x @ true_weight.T + true_bias
    weight, bias = fitted(x, y).regression()
    spread = y.double().std()
    assert ((x.double() @ weight.T + bias - y).abs().max() / spread).item() < 1e-4
    torch.testing.assert_close(weight[:, 1:].float(), true_weight[:, 1:], atol=2e-3, rtol=1e-3)


def test_it_is_the_direct_solution_on_noisy_targets() -> None:
    torch.manual_seed(0)
    x, y = 5 + torch.randn(300, 6), torch.randn(300, 4)
    weight, bias = fitted(x, y, rows=7).regression()
    with_ones = torch.cat([x, torch.ones(300, 1)], dim=1).double()
    direct = torch.linalg.lstsq(with_ones, y.double()).solution.T
    torch.testing.assert_close(weight, direct[:, :-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bias, direct[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 3000.0])
def test_a_constant_channel_changes_nothing(value: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(300, 6), torch.randn(300, 4)
    alone, expected_bias = fitted(x, y).regression()
    weight, bias = fitted(torch.cat([x, torch.full((300, 1), value)], dim=1), y).regression()
    torch.testing.assert_close(weight[:, :-1], alone, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(bias + value * weight[:, -1], expected_bias, atol=1e-6, rtol=1e-6)
    assert weight[:, -1].abs().max() < 1e-3


def test_dependent_channels_and_few_positions_still_have_a_solution() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    x = torch.cat([x, x.sum(1, keepdim=True)], dim=1)
    y = torch.randn(5, 3)
    weight, bias = fitted(x, y).regression()
    assert weight.isfinite().all()
    torch.testing.assert_close(x.double() @ weight.T + bias, y.double(), atol=1e-3, rtol=1e-3)


def test_input_moments_are_those_of_the_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    mean, second = fitted(x, torch.randn(40, 2), rows=9).input_moments()
    torch.testing.assert_close(mean.float(), x.mean(0))
    torch.testing.assert_close(second.float(), x.T @ x / 40)


def test_without_a_position_there_is_no_regression() -> None:
    sums = LeastSquares()
    with pytest.raises(ValueError, match="at least one valid position"):
        sums.regression()
    sums.add(torch.zeros(0, 3), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="at least one valid position"):
        sums.regression()


def test_nothing_is_float64_on_the_device() -> None:
    sums = LeastSquares()
    sums.add(without_float64(torch.randn(9, 4)), without_float64(torch.randn(9, 3)))
    weight, bias = sums.regression()
    assert sums.count == 9
    assert weight.dtype == bias.dtype == torch.float64
