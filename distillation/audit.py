"""What a teacher's hidden states are like, level by level, before anything learns from them.

Massive activations decide which loss can work, and the spectrum how much of a level a narrower
student can reach at all. A few thousand tokens through the teacher tell.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError, UsageError
from cleangpt.runtime.module_state import preserved_modes
from distillation.audit_text import audit_table
from distillation.batch import Batch, in_parts
from distillation.losses import TargetStatistics
from distillation.losses.divergence import at_least_float32
from distillation.losses.target_statistics import token_normalised

MASSIVE_RATIO = 100
"""A channel is massive if one of its values is so many times the level's median magnitude.

Sun et al. 2024 (arXiv:2402.17762, section 2) name single values from 1000 times the median on. One
a tenth of that, if it stands at every position, rules a squared error as well.
"""

NORM_QUANTILES = (0.05, 0.5, 0.95, 1.0)
_WIDTHS_IN_JSON = 64
"""At least; at most twice as many, a power of two apart, and all widths of a narrow teacher."""


@dataclass(frozen=True, eq=False)
class LevelAudit:
    """The raw hidden states of one level, over all valid positions.

    Args:
        level: 0 enters block 0; i + 1 is the raw output of block i.
        rms: Root of the mean square over positions and channels.
        token_norms: 5th, 50th and 95th percentile and maximum of the positions' Euclidean norms.
        first_position_ratio: Root mean square norm at each window's first valid position, divided
            by the median norm elsewhere; NaN if there is no other position.
        largest_channel_share: Share of the energy (sum of squares) in the channel with the most.
        massive_channels: Channels with a value of at least ``MASSIVE_RATIO`` times the median
            magnitude, the largest first. The median is that over positions of the medians over
            channels.
        effective_rank: Participation ratio ``(sum lambda)^2 / sum lambda^2`` of the covariance's
            eigenvalues: 1 if all variance is in one direction, d if it is the same in all.
        floors: Entry k is the share of the variance outside the k + 1 leading directions, of the
            states as normalising losses see them: per token, then per channel.
        raw_floors: The same of the states as they are.
    """

    level: int
    rms: float
    token_norms: tuple[float, float, float, float]
    first_position_ratio: float
    largest_channel_share: float
    massive_channels: tuple[int, ...]
    effective_rank: float
    floors: Float[Tensor, " d"]
    raw_floors: Float[Tensor, " d"]

    def rank_floor(self, d_student: int) -> float:
        """The least relative error of a linear read-out of so many channels, of normalised states.

        ``1 - sum_{i <= d_student} lambda_i / sum lambda`` with the eigenvalues of the target's
        covariance in falling order (Eckart & Young 1936), in [0, 1].
        """
        return _at_width(self.floors, d_student)

    def raw_rank_floor(self, d_student: int) -> float:
        """As :meth:`rank_floor`, of raw states: the floor of a plain mean squared error."""
        return _at_width(self.raw_floors, d_student)

    def to_json(self, widths: Sequence[int]) -> dict[str, Any]:
        """Plain numbers; ``widths`` are those at which the floors are given."""
        low, median, high, largest = self.token_norms
        return {
            "level": self.level,
            "rms": self.rms,
            "token_norm": {"5 %": low, "50 %": median, "95 %": high, "max": largest},
            "first_position_ratio": _or_none(self.first_position_ratio),
            "largest_channel_share": _or_none(self.largest_channel_share),
            "massive_channels": list(self.massive_channels),
            "effective_rank": _or_none(self.effective_rank),
            "rank_floor": [round(self.rank_floor(width), 6) for width in widths],
            "raw_rank_floor": [round(self.raw_rank_floor(width), 6) for width in widths],
        }


@dataclass(frozen=True, eq=False)
class TeacherAudit:
    """The levels of a teacher, and their statistics for losses that normalise.

    Args:
        tokens: Valid positions measured.
        levels: One audit per level: what enters block 0, then each block's raw output.
        level_statistics: The statistics of the same levels, on the CPU.
        level_means: Mean raw state of the same levels.
    """

    tokens: int
    levels: list[LevelAudit]
    level_statistics: list[TargetStatistics]
    level_means: list[Float[Tensor, " d"]]

    def statistics(self, level: int) -> TargetStatistics:
        """Statistics of a level's token-normalised states; level i + 1 is block i's output."""
        return self.level_statistics[level]

    def pooled_covariance(self) -> Float[Tensor, "d d"]:
        """Covariance of token-normalised states, rescaled to trace 1 per level, mean over levels.

        Means are removed per level, so its leading eigenvectors are the directions in which the
        states of all levels vary, none of which counts for more because its states are larger.
        """
        total = torch.zeros_like(self.level_statistics[0].covariance)
        for statistics in self.level_statistics:
            trace = statistics.covariance.trace().clamp(min=torch.finfo(torch.float32).tiny)
            total += statistics.covariance / trace
        return total / len(self.level_statistics)

    def to_json(self) -> dict[str, Any]:
        """Everything but the covariances, with the floors at evenly spaced student widths."""
        d = len(self.level_statistics[0].mean)
        step = 2 ** max(0, int(math.log2(d / _WIDTHS_IN_JSON)))
        widths = sorted({*range(step, d + 1, step), d})
        return {
            "tokens": self.tokens,
            "width": d,
            "floor_widths": widths,
            "levels": [level.to_json(widths) for level in self.levels],
        }

    def shown(self, d_student: int) -> str:
        """The audit as a table, with the floors of a student of this width."""
        columns, rows = audit_table(self.to_json(), d_student)
        lines = [columns, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )


@torch.no_grad()
def audit_teacher(
    teacher: BlockStack, batches: Iterable[Batch], max_tokens: int = 100_000
) -> TeacherAudit:
    """Measure a teacher's hidden states at every level.

    Sums are kept in float64, two [d, d] matrices per level.

    Args:
        teacher: The model; it runs in eval mode and is left as it was.
        batches: Data to measure on; padding does not count.
        max_tokens: Stop after this many valid positions.

    Raises:
        InputError: If no position is valid, or a state is not finite.
    """
    sums = [_LevelSums() for _ in range(teacher.num_blocks + 1)]
    with preserved_modes(teacher.model):
        teacher.model.eval()
        for batch in in_parts(batches):
            states = teacher.block_hidden_states(batch.input_ids, batch.mask)
            is_first = _first_positions(batch)
            for own, state in zip(sums, states, strict=True):
                own.add(batch.valid(state), is_first)
            if sums[0].count >= max_tokens:
                break
    if sums[0].count == 0:
        raise InputError(
            "No valid position to audit the teacher's hidden states on.",
            "Give batches whose attention_mask is not 0 everywhere.",
        )
    measured = [own.result(level) for level, own in enumerate(sums)]
    return TeacherAudit(
        sums[0].count,
        [audit for audit, _, _ in measured],
        [statistics for _, statistics, _ in measured],
        [mean for _, _, mean in measured],
    )


def pca_basis(
    covariance: Float[Tensor, "d_teacher d_teacher"], width: int
) -> Float[Tensor, "d_teacher d_student"]:
    """Return the leading eigenvectors of a covariance as orthonormal columns.

    Args:
        covariance: Symmetric, as :meth:`TeacherAudit.pooled_covariance` gives it.
        width: How many, 1 to d_teacher. The entry of largest magnitude of each is positive, so that
            the same covariance gives the same signs everywhere.

    Raises:
        UsageError: If there are not so many.
    """
    if not 1 <= width <= len(covariance):
        raise UsageError(
            f"A basis of {width} directions does not fit in the teacher's width {len(covariance)}.",
            "Choose a student no wider than the teacher, or another start than its components.",
        )
    _, vectors = torch.linalg.eigh(covariance.cpu().double())
    leading = vectors.flip(-1)[:, :width]
    largest = leading.gather(0, leading.abs().argmax(0, keepdim=True))
    return (leading * largest.sign()).to(covariance)


class _LevelSums:
    """Streaming sums of one level, and two numbers per position."""

    def __init__(self) -> None:
        self.count = 0
        self._raw = _Moments()
        self._normalised = _Moments()
        self._peaks: Tensor | float = 0.0
        self._norms: list[Tensor] = []
        self._medians: list[Tensor] = []
        self._is_first: list[Tensor] = []

    def add(
        self, states: Float[Tensor, "positions d"], is_first: Bool[Tensor, " positions"]
    ) -> None:
        if len(states) == 0:
            return
        states = at_least_float32(states)
        magnitudes = states.abs()
        self.count += len(states)
        self._raw.add(states)
        self._normalised.add(token_normalised(states))
        self._peaks = magnitudes.amax(0).cpu().maximum(torch.as_tensor(self._peaks))
        self._norms.append(torch.linalg.vector_norm(states, dim=-1).cpu().double())
        self._medians.append(magnitudes.median(-1).values.cpu())
        self._is_first.append(is_first)

    def result(self, level: int) -> tuple[LevelAudit, TargetStatistics, Tensor]:
        mean, covariance = self._raw.mean_and_covariance()
        if not bool(covariance.isfinite().all()):
            raise InputError(
                f"The teacher's hidden states hold NaN or infinity at level {level}"
                f" ({f'the output of block {level - 1}' if level else 'what enters block 0'}).",
                "Run it in a wider precision, or check its weights.",
            )
        normalised_mean, normalised_covariance = self._normalised.mean_and_covariance()
        statistics = TargetStatistics.from_moments(normalised_mean, normalised_covariance)
        std = statistics.std.double()
        energies = covariance.diagonal() + mean.square()
        norms, is_first = torch.cat(self._norms), torch.cat(self._is_first)
        quantiles = [_quantile(norms, q) for q in NORM_QUANTILES]
        audit = LevelAudit(
            level=level,
            rms=energies.mean().sqrt().item(),
            token_norms=(quantiles[0], quantiles[1], quantiles[2], quantiles[3]),
            first_position_ratio=_ratio(
                norms[is_first].square().mean().sqrt().item(), _quantile(norms[~is_first], 0.5)
            ),
            largest_channel_share=_ratio(energies.max().item(), energies.sum().item()),
            massive_channels=self._massive_channels(),
            effective_rank=_ratio(
                covariance.trace().square().item(), covariance.square().sum().item()
            ),
            floors=_floors(normalised_covariance / std / std[:, None]),
            raw_floors=_floors(covariance),
        )
        return audit, statistics, mean.float()

    def _massive_channels(self) -> tuple[int, ...]:
        peaks, median = torch.as_tensor(self._peaks), _quantile(torch.cat(self._medians), 0.5)
        order = peaks.argsort(descending=True).tolist()
        return tuple(c for c in order if 0 < MASSIVE_RATIO * median <= peaks[c].item())


class _Moments:
    """Mean and covariance from streaming sums in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, states: Tensor) -> None:
        wide = _wide(states)
        self._count += len(wide)
        self._sum = wide.sum(0) + self._sum
        self._squares = wide.T @ wide + self._squares

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(self._sum).cpu() / self._count
        second = torch.as_tensor(self._squares).cpu() / self._count
        return mean, second - torch.outer(mean, mean)


def _wide(states: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (states.cpu() if states.device.type == "mps" else states).double()


def _first_positions(batch: Batch) -> Bool[Tensor, " positions"]:
    """Whether each valid position is the first one of its row."""
    is_first = batch.host_mask & (batch.host_mask.long().cumsum(-1) == 1)
    return is_first[batch.host_mask]


def _quantile(values: Tensor, q: float) -> float:
    """The value at this share of the order, by nearest rank; NaN of nothing.

    ``torch.quantile`` refuses more than 2^24 values.
    """
    if len(values) == 0:
        return math.nan
    return values.sort().values[math.ceil(q * len(values)) - 1].item()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _floors(covariance: Tensor) -> Float[Tensor, " d"]:
    """Entry k: the share of the variance outside the k + 1 leading directions."""
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)  # rising
    outside = values.cumsum(0) - values
    total = values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (outside / total).flip(0)


def _at_width(floors: Tensor, d_student: int) -> float:
    return floors[d_student - 1].item() if d_student <= len(floors) else 0.0
