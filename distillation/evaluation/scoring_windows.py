"""Which token is scored in which window.

A text of N tokens is read in windows of at most L inputs. Every token except the very first is
scored exactly once, and each window after the first scores only its last ``stride`` tokens, so that
all of them have at least ``L - stride + 1`` tokens of context. With N = 8, L = 4, stride = 2::

    token      0  1  2  3  4  5  6  7
    window 0   i  i  i  i                 scores 1 2 3 4
    window 1         i  i  i  i           scores 5 6
    window 2            i  i  i  i        scores 7

The target of an input is the token after it, so the last input of window 0 predicts token 4. That
is the shift of HuggingFace's ``labels``: for a text that fits one window, the mean is HF's loss.
This file knows token ids only; ``metrics.py`` runs the models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Window:
    """Inputs ``start`` to ``end`` (exclusive); predictions from input ``first_scored`` on count."""

    start: int
    end: int
    first_scored: int


@dataclass(frozen=True)
class WindowBatch:
    """Windows side by side, padded on the right.

    Args:
        input_ids: What the models read.
        targets: The token after each input; anything where ``scored`` is False.
        valid: True at real inputs, from the lengths.
        scored: True where the prediction counts.
    """

    input_ids: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]
    valid: Bool[Tensor, "batch seq"]
    scored: Bool[Tensor, "batch seq"]


def plan_windows(num_tokens: int, seq_len: int, stride: int) -> list[Window]:
    """Return the windows that score tokens 1 to ``num_tokens - 1`` once each.

    Raises:
        ValueError: If ``stride`` is not between 1 and ``seq_len``.
    """
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride={stride} must be between 1 and the context length {seq_len}")
    num_inputs = num_tokens - 1
    windows: list[Window] = []
    done = 0
    while done < num_inputs:
        end = min(num_inputs, done + (stride if windows else seq_len))
        windows.append(Window(start=max(0, end - seq_len), end=end, first_scored=done))
        done = end
    return windows


class _WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows as items; the last target of a text is its last token."""

    def __init__(self, token_ids: Sequence[int], windows: Sequence[Window]) -> None:
        self.token_ids = torch.as_tensor(token_ids, dtype=torch.long)
        self.windows = list(windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index]
        return {
            "input_ids": self.token_ids[window.start : window.end],
            "targets": self.token_ids[window.start + 1 : window.end + 1],
            "scored": torch.arange(window.start, window.end) >= window.first_scored,
        }


def _collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad on the right; the mask comes from lengths, since a padding id may be a real token."""
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    longest = int(lengths.max())
    batch = {
        key: torch.nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True)
        for key in ("input_ids", "targets", "scored")
    }
    batch["valid"] = torch.arange(longest) < lengths[:, None]
    return batch


def window_batches(
    token_ids: Sequence[int], windows: Sequence[Window], batch_size: int, num_workers: int = 0
) -> Iterator[WindowBatch]:
    """Yield the windows in order, ``batch_size`` at a time."""
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        _WindowDataset(token_ids, windows),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else iterating draws from the global one
    )
    for batch in loader:
        yield WindowBatch(**batch)
