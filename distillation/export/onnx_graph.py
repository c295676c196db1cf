"""A student as one ONNX graph, with its KV cache among the inputs and outputs.

The names are those of ``optimum``: ``input_ids``, ``attention_mask``, ``past_key_values.0.key`` and
so on in, ``logits``, ``present.0.key`` and so on out. A first call passes a past of length 0.
Batch, new tokens and past are of any length, so that one graph reads a prompt and generates.
"""

import logging
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from distillation.export.comparing import Difference, check, random_tokens
from model import StudentModel

FILE_NAME: Final = "model.onnx"


class _WithPast(nn.Module):
    """The student as a function of tensors alone."""

    def __init__(self, student: StudentModel) -> None:
        super().__init__()
        self.student = student

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return logits, and keys and values of every block by turns."""
        cache = DynamicCache(config=self.student.config)
        for index in range(len(past) // 2):
            cache.update(past[2 * index], past[2 * index + 1], index)
        output = self.student(input_ids, attention_mask, past_key_values=cache)
        states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
        return (output.logits, *states)


def write_onnx(student: StudentModel, file: Path) -> None:
    """Write the graph, for the CPU in fp32.

    Args:
        student: In eval mode.
        file: Where to; weights over two gigabytes go to a file beside it.
    """
    config = student.config
    batch, new, past = 2, 3, 4  # any lengths but 0 and 1, which would be taken for constants
    example = (
        torch.zeros(batch, new, dtype=torch.long),
        torch.ones(batch, past + new, dtype=torch.long),
        _empty_past(config, batch, past),
    )
    lengths: Any = (
        {0: "batch", 1: "new"},
        {0: "batch", 1: "all"},
        [{0: "batch", 2: "past"}] * (2 * config.n_layer),
    )
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it names packages that nobody needs here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _WithPast(student).eval(),
                example,
                dynamo=True,
                dynamic_shapes=lengths,
                input_names=[
                    "input_ids",
                    "attention_mask",
                    *_state_names(config, "past_key_values"),
                ],
                output_names=["logits", *_state_names(config, "present")],
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    program.save(file)


def _state_names(config: Any, prefix: str) -> list[str]:
    return [f"{prefix}.{i}.{kind}" for i in range(config.n_layer) for kind in ("key", "value")]


def _empty_past(config: Any, batch: int, length: int) -> list[Tensor]:
    shape = (batch, config.n_head, length, config.head_dim)
    return [torch.zeros(shape) for _ in range(2 * config.n_layer)]


@torch.no_grad()
def compare_in_runtime(student: StudentModel, file: Path) -> Difference:
    """Run the graph in onnxruntime on a batch padded on the left, whole and then one token more.

    Raises:
        CheckpointError: If its logits are not the student's.
    """
    import onnxruntime

    config = student.config
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    ids = random_tokens(config.vocab_size, config.block_size, rows=3)
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    expected = student(ids, mask).logits
    real, last = mask[:, :-1].bool(), ids.shape[1] - 1
    first = _run(session, ids[:, :-1], mask[:, :-1], _empty_past(config, 3, 0))
    second = _run(session, ids[:, last:], mask, first[1:])
    found = torch.cat((first[0][real], second[0][:, 0]))
    difference = Difference.of(torch.cat((expected[:, :-1][real], expected[:, last])), found)
    check(difference)
    return difference


def _run(session: Any, ids: Tensor, mask: Tensor, past: list[Tensor]) -> list[Tensor]:
    names = [item.name for item in session.get_inputs()]
    values = [item.numpy() for item in (ids, mask, *past)]
    found = session.run(None, dict(zip(names, values, strict=True)))
    return [torch.from_numpy(item) for item in found]
