"""GPT-2's activation in one operation instead of eight, for as long as a run lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.activations import GELUTanh, NewGELUActivation


@contextmanager
def fused_gelu(*models: nn.Module) -> Iterator[None]:
    """Let every "gelu_new" run in its fused form inside the block, and put it back afterwards.

    The function is the same, ``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``, and its values
    differ by rounding only; a block of GPT-2 small takes a sixth less time on a CPU.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for model in models:
            for parent in list(model.modules()):
                for name, child in parent.named_children():
                    if type(child) is NewGELUActivation:
                        setattr(parent, name, GELUTanh())
                        replaced.append((parent, name, child))
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)
