"""Matrix products alone: the least that a step can take."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.cases import Shape

Product = tuple[Tensor, Tensor]


def bare_seconds(work: Sequence[Product]) -> float:
    """The median time of all products, on resident operands and into resident results."""
    results = [torch.mm(left, right) for left, right in work]
    device = results[0].device
    seconds = []
    for _ in range(5):
        started_at = time.perf_counter()
        for (left, right), result in zip(work, results, strict=True):
            torch.mm(left, right, out=result)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds)


def head_seconds(shape: Shape, dtype: torch.dtype) -> float:
    """The products of one step of the head: both models' logits, and the gradient of the head.

    States come from the store, and no gradient leaves the head: nothing can be left out of these.
    """

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=shape.device).to(dtype)

    tokens, vocab = shape.tokens_per_batch, shape.vocab
    teacher, teacher_head = random(tokens, shape.teacher_width), random(vocab, shape.teacher_width)
    student, head = random(tokens, shape.student_width), random(vocab, shape.student_width)
    gradient = random(tokens, vocab)
    return bare_seconds([(teacher, teacher_head.t()), (student, head.t()), (gradient.t(), student)])
