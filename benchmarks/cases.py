"""What is measured: shapes, random models of these shapes, and random windows.

Weights and tokens do not matter for speed, so nothing is downloaded and every figure can be taken
again anywhere.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from cleangpt.blocks import BlockStack
from config_distillation import GPTConfig
from distillation.layer_map import uniform_layer_map
from distillation.trainers.stage_loop import derived_seed
from model import build_student
from stitching_layers import StitchingLayers

KINDS = ("Vanilla", "Factored", "SASP")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one measurement.

    Args:
        blocks: Blocks of both models.
        teacher_width: Hidden size of the teacher, a multiple of 64.
        student_width: Hidden size of the student.
        student_heads: Attention heads of the student.
        vocab: Tokens of the vocabulary.
        batch_size: Windows per batch.
        seq_len: Tokens per window.
        batches: Batches of the data.
        epochs: Passes over the data, per block and of the head.
        dropout: Of the student, while its block is in training.
        device: Where both models are.
    """

    blocks: int = 12
    teacher_width: int = 768
    student_width: int = 384
    student_heads: int = 6
    vocab: int = 50257
    batch_size: int = 8
    seq_len: int = 128
    batches: int = 3
    epochs: int = 3
    dropout: float = 0.0
    device: str = "cpu"

    @property
    def tokens_per_batch(self) -> int:
        """Positions of one batch."""
        return self.batch_size * self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of one stage."""
        return self.batches * self.epochs

    def __str__(self) -> str:
        """Teacher and student as layers x width, and the batch."""
        return (
            f"teacher {self.blocks}x{self.teacher_width}, vocabulary {self.vocab},"
            f" student {self.blocks}x{self.student_width}, batch {self.batch_size}x{self.seq_len}"
        )


class Windows(Dataset[dict[str, Tensor]]):
    """Random full windows."""

    def __init__(self, count: int, seq_len: int, vocab: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(vocab, (count, seq_len), generator=generator)

    def __len__(self) -> int:
        """How many windows there are."""
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window and its mask, both of shape [seq]."""
        ids = self.input_ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def windows_loader(shape: Shape) -> DataLoader[dict[str, Tensor]]:
    """The data, shuffled anew in each epoch."""
    windows = Windows(shape.batches * shape.batch_size, shape.seq_len, shape.vocab)
    return DataLoader(windows, batch_size=shape.batch_size, shuffle=True)


def new_teacher(shape: Shape) -> Any:
    """A GPT-2 of random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=max(shape.seq_len, 128),
        n_embd=shape.teacher_width,
        n_layer=shape.blocks,
        n_head=max(1, shape.teacher_width // 64),
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config).eval().requires_grad_(False)
    return model.to(shape.device)


def new_student(kind: str, shape: Shape) -> Any:
    """A student of random weights."""
    torch.manual_seed(1)
    config = GPTConfig(
        block_size=max(shape.seq_len, 128),
        vocab_size=shape.vocab,
        n_layer=shape.blocks,
        n_head=shape.student_heads,
        n_embd=shape.student_width,
        dropout=shape.dropout,
        model_type=kind,
    )
    student: Any = build_student(config)
    return student.to(shape.device)


def starting_stitches(teacher: nn.Module, student: nn.Module, seed: int = 0) -> StitchingLayers:
    """The stitching layers as the backbone trainer starts them."""
    above, below = BlockStack(teacher), BlockStack(student)
    layer_map = uniform_layer_map(below.num_blocks, above.num_blocks)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "stitches"))
        stitches = StitchingLayers(layer_map, below.hidden_size, above.hidden_size)
    return stitches.to(below.device)


def before_block(start: Any, trained: Any, block: int) -> Any:
    """A student as it is when the training of ``block`` begins.

    The blocks before it are trained, with the embeddings; it and the blocks after it are new.
    """
    if block == 0:
        return copy.deepcopy(start)
    model = copy.deepcopy(trained)
    new, old = BlockStack(model), BlockStack(start)
    for index in range(block, new.num_blocks):
        new.block(index).load_state_dict(old.block(index).state_dict())
    return model


@torch.no_grad()
def before_head(start: Any, trained: Any) -> Any:
    """A student as it is when the head phase begins: its backbone trained, its head untied.

    Args:
        start: The student before any training, its head tied to the embeddings.
        trained: The same one after all of it.
    """
    model = copy.deepcopy(trained)
    stack = BlockStack(model)
    stack.final_norm.load_state_dict(BlockStack(start).final_norm.state_dict())
    stack.lm_head.weight.copy_(model.get_input_embeddings().weight)
    return model
