"""Perplexity, divergence from the teacher and agreement, summed token by token.

All sums are over the scored positions of ``scoring_windows.py`` and are divided once, at the end,
by their count: batches, padding and ragged windows cannot weigh in. Models are anything with
``logits(input_ids, attention_mask)``, so this file knows no architecture.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from distillation.evaluation.results import QualityResult
from distillation.evaluation.scoring_windows import WindowBatch
from distillation.losses.divergence import tempered_kl

POSITIONS_PER_CHUNK = 256
BINS = 15
"""Of the calibration error, as many as Guo et al. take."""


@runtime_checkable
class LogitModel(Protocol):
    """What is asked of a model: its device and its logits."""

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the scores of the next token, [batch, seq, vocab]."""


@dataclass
class TokenSums:
    """Running sums over scored tokens: nats, divergence, agreements, and confidence by bin.

    Args:
        num_tokens: Scored tokens.
        loss: In nats.
        kl: In nats.
        agreements: Where model and teacher put the same token first.
        overconfidence: For each bin of the first token's probability, the sum of that probability
            less the number of times that it was the token that came.
    """

    num_tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    overconfidence: list[float] = field(default_factory=lambda: [0.0] * BINS)

    def add(
        self,
        logits: Float[Tensor, "positions vocab"],
        teacher_logits: Float[Tensor, "positions teacher_vocab"],
        targets: Int[Tensor, " positions"],
    ) -> None:
        """Add positions, a chunk at a time so that fp32 copies stay small.

        The loss uses all of the model's own rows; the divergence uses the rows both models have.
        """
        for start in range(0, len(targets), POSITIONS_PER_CHUNK):
            rows = slice(start, start + POSITIONS_PER_CHUNK)
            own, theirs = logits[rows].float(), teacher_logits[rows].float()
            self.num_tokens += len(own)
            nats = F.cross_entropy(own, targets[rows], reduction="none")
            self.loss += nats.cpu().double().sum().item()  # Apple's GPUs have no float64
            self._add_confidence(own, targets[rows])
            shared = min(own.shape[-1], theirs.shape[-1])
            own, theirs = own[:, :shared], theirs[:, :shared]
            self.kl += tempered_kl(own, theirs, temperature=1.0).item() * len(own)
            self.agreements += int((own.argmax(-1) == theirs.argmax(-1)).sum())

    def _add_confidence(self, logits: Tensor, targets: Tensor) -> None:
        highest, first = logits.max(-1)
        confidence = (highest - logits.logsumexp(-1)).exp()
        surplus = confidence - (first == targets).float()
        bins = (confidence.nan_to_num() * BINS).ceil().long().clamp(1, BINS) - 1
        for index, value in zip(bins.tolist(), surplus.tolist(), strict=True):
            self.overconfidence[index] += value


@torch.no_grad()
def score_models(
    models: Sequence[LogitModel], teacher: LogitModel, batches: Iterable[WindowBatch]
) -> list[TokenSums]:
    """Return the sums of each model; the teacher runs once per batch, whatever their number."""
    sums = [TokenSums() for _ in models]
    for batch in batches:
        teacher_scored = _scored_logits(teacher, batch)
        targets = batch.targets[batch.scored]
        for model, model_sums in zip(models, sums, strict=True):
            own = teacher_scored if model is teacher else _scored_logits(model, batch)
            theirs = teacher_scored.to(own.device)
            model_sums.add(own, theirs, targets.to(own.device))
    return sums


def _scored_logits(model: LogitModel, batch: WindowBatch) -> Tensor:
    """Logits at the scored positions only, [positions, vocab]."""
    logits = model.logits(batch.input_ids.to(model.device), batch.valid.long().to(model.device))
    return logits[batch.scored.to(logits.device)]


def quality_from_sums(sums: TokenSums, teacher: TokenSums, num_bytes: int) -> QualityResult:
    """Divide once, at the end.

    Args:
        sums: The model's.
        teacher: The teacher's, over the same tokens.
        num_bytes: UTF-8 bytes of the scored text.

    Returns:
        NaN or infinity where the model's loss is not finite or its perplexity overflows.
    """
    count = max(sums.num_tokens, 1)
    loss, teacher_loss = sums.loss / count, teacher.loss / max(teacher.num_tokens, 1)
    return QualityResult(
        loss_nats=loss,
        perplexity=_exp(loss),
        perplexity_ratio=_exp(loss - teacher_loss),
        bits_per_byte=sums.loss / math.log(2) / max(num_bytes, 1),
        kl_nats=sums.kl / count,
        top1_agreement=sums.agreements / count,
        # Guo et al. 2017, arXiv:1706.04599, equation 3.
        calibration_error=sum(abs(surplus) for surplus in sums.overconfidence) / count,
        num_tokens=sums.num_tokens,
    )


def _exp(value: float) -> float:
    """Exponentiate without OverflowError."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
