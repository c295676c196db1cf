"""The basis in which a student of another width sees the teacher's states, and weights in it.

A skip connection passes states from block to block unchanged, so all maps of a model are seen
through one basis (SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024).
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from cleangpt.errors import UsageError
from distillation.audit import pca_basis
from distillation.teacher_weights import LinearMap, gain_and_bias

BASES: Final = ("pca", "slice")
"""Starts that look at the teacher's states first."""


@dataclass(frozen=True, eq=False)
class SharedBasis:
    """What a basis does to maps from and to the residual stream.

    Args:
        columns: The student's directions in the teacher's space: orthonormal columns or, for a
            wider student, the identity and then zeros.
    """

    columns: Float[Tensor, "d_teacher d_student"]

    def reading(self, linear: LinearMap) -> LinearMap:
        """A map that reads the stream through the student's plain norm.

        ``norm(h) ~ U norm(s) sqrt(d_t / d_s)`` up to the share of the energy that the basis holds,
        and up to the mean over channels, which the student subtracts in its own: both measured on
        the built-in teacher, and not worth a correction.
        """
        scale = (self.columns.shape[0] / self.columns.shape[1]) ** 0.5
        return LinearMap(linear.weight @ self.columns * scale, linear.bias)

    def writing(self, linear: LinearMap) -> LinearMap:
        """A map that writes to the stream."""
        return LinearMap(self.columns.T @ linear.weight, linear.bias @ self.columns)


def find_basis(how: str, covariance: Float[Tensor, "d d"], width: int) -> Float[Tensor, "d width"]:
    """The basis of a student of that width: of "slice", else of the main directions.

    Args:
        how: The setting's name.
        covariance: Of the teacher's states, over all levels.
        width: The student's.
    """
    if width > len(covariance):
        return wide_basis(covariance, width)
    return slice_basis(covariance, width) if how == "slice" else pca_basis(covariance, width)


def slice_basis(covariance: Float[Tensor, "d d"], width: int) -> Float[Tensor, "d width"]:
    """The ``width`` channels of most variance, as columns of the identity.

    Raises:
        UsageError: If there are not so many.
    """
    if not 1 <= width <= len(covariance):
        raise UsageError(
            f"A choice of {width} channels does not fit in the teacher's width {len(covariance)}.",
            "Choose a student no wider than the teacher, or --init_from_teacher none.",
        )
    chosen = covariance.diagonal().topk(width).indices.sort().values.cpu()
    return torch.eye(covariance.shape[0])[:, chosen]


def wide_basis(covariance: Tensor, width: int) -> Float[Tensor, "d_teacher d_student"]:
    """All channels of the teacher as the first ones of a wider student.

    It then computes nearly what the teacher does, as in Net2Net (Chen et al. 2016,
    arXiv:1511.05641).

    Args:
        covariance: Of the teacher's states, for its width.
        width: The student's.
    """
    return torch.eye(width)[: len(covariance)].to(covariance)


def make_plain(norm: Any) -> None:
    """Let a norm only normalise: its gain is in the maps that follow."""
    norm.weight.fill_(1.0)
    if getattr(norm, "bias", None) is not None:
        norm.bias.zero_()
    gain, _ = gain_and_bias(norm, len(norm.weight))
    norm.weight.add_(1.0 - float(gain.mean().round()))  # Gemma's gain is one plus its weight


def set_linear(module: Any, linear: LinearMap) -> bool:
    """Set the first rows and columns; return whether a bias had no place.

    Rows beyond them stay as built, and what reads them becomes zero: they add nothing, but learn.
    """
    rows, columns = linear.weight.shape
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    weight[:rows, :columns] = linear.weight.to(weight)
    weight[:, columns:] = 0.0
    if module.bias is None:
        return bool(linear.bias.any())
    module.bias.zero_()
    module.bias[:rows] = linear.bias.to(module.bias)
    return False
