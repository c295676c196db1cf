"""What is trained, on what, against what.

A stage names its trainable tensors and turns a batch into a loss. It knows neither optimizers nor
loops; ``trainers/base_trainer.py`` runs it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.heads import head_is_linear, logits_at
from distillation.activations import Activations
from distillation.batch import Batch
from distillation.losses.chunked import (
    Logits,
    checkpointed_loss,
    chunked_linear_loss,
    linear_head,
    product_dtype,
)
from stitching_layers import StitchingLayer

Loss = Callable[[Tensor, Tensor], Tensor]
"""``(student, teacher) -> mean over positions``, both of shape [positions, dim]."""


class Stage(ABC):
    """One unit of training.

    Args:
        name: Short and unique in the run, e.g. "block-03".
        student: The model of which this stage trains a part.
    """

    def __init__(self, name: str, student: BlockStack) -> None:
        self.name = name
        self.student = student

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The modules in training, by a name that is unique in the stage."""

    @abstractmethod
    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the mean loss over the batch's valid positions, with its graph."""

    def count(self, batch: Batch) -> int:
        """The positions the loss of a batch is a mean over."""
        return batch.num_valid

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The tensors the optimizer gets, each once, also when a module appears twice."""
        seen: set[int] = set()
        parameters: dict[str, nn.Parameter] = {}
        for prefix, module in self.modules().items():
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    parameters[f"{prefix}.{name}"] = parameter
        return parameters

    def compilable(self) -> list[nn.Module]:
        """The modules in training whose forward passes are worth compiling."""
        return []

    def start_epoch(self) -> None:  # noqa: B027 - most stages measure nothing per epoch
        """Called before each epoch."""

    def summary(self) -> dict[str, float]:
        """What the stage measured in its last epoch, besides the loss."""
        return {}


class BlockStage(Stage):
    """A student block learns the raw output of its teacher block, through its own stitch.

    Block 0 learns together with the embeddings, which no other stage would train.

    Args:
        block: Index of the student block.
        teacher_block: Index of the teacher block it learns from.
        activations: Where inputs and targets come from.
        loss_fn: The loss on hidden states.
        stitch: The projection to the teacher's width; None compares the states as they are.
        freeze_previous: Whether the blocks before it stay fixed.
        first_position: Earlier positions of each window are not compared.
    """

    def __init__(
        self,
        block: int,
        teacher_block: int,
        activations: Activations,
        loss_fn: Loss,
        *,
        stitch: StitchingLayer | None,
        freeze_previous: bool,
        first_position: int = 0,
    ) -> None:
        super().__init__(f"block-{block:02d}", activations.student)
        self.block = block
        self.teacher_block = teacher_block
        self.activations = activations
        self.loss_fn = loss_fn
        self.stitch = stitch
        self.freeze_previous = freeze_previous
        self.first_position = first_position
        self._fit = FitStatistics()

    def modules(self) -> dict[str, nn.Module]:
        """The block and its stitch; with them the embeddings, and earlier blocks unless frozen."""
        first = self.block if self.freeze_previous else 0
        found = {f"blocks.{i}": self.student.block(i) for i in range(first, self.block + 1)}
        if first == 0:
            found.update(embedding_modules(self.student))
        if self.stitch is not None:
            found["stitch"] = self.stitch
        return found

    def compilable(self) -> list[nn.Module]:
        """The student block."""
        return [self.student.block(self.block)]

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the mean hidden-state loss over the compared positions."""
        student, teacher = self.states(batch)
        compared = batch.without_first(self.first_position)
        student, teacher = compared.valid(student), compared.valid(teacher)
        self._fit.add(student.detach(), teacher)
        return self.loss_fn(student, teacher)

    def count(self, batch: Batch) -> int:
        """The compared positions."""
        return batch.without_first(self.first_position).num_valid

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the stitched student states and the teacher's, both [batch, seq, d_teacher]."""
        teacher = self.activations.teacher_output(self.teacher_block, batch)
        state = self._student_output(batch)
        self.activations.hand_over(self.block, batch, state)
        student = self.student.hidden(state)
        return (student if self.stitch is None else self.stitch(student)), teacher

    def start_epoch(self) -> None:
        """Forget the statistics of the epoch before."""
        self._fit = FitStatistics()

    def summary(self) -> dict[str, float]:
        """The error relative to the best constant predictor (1.0), over the last epoch."""
        return {"relative_error": self._fit.relative_error()}

    def _student_output(self, batch: Batch) -> Tensor:
        if self.block == 0 or not self.freeze_previous:
            return self.student.state_entering(self.block + 1, batch.input_ids, batch.mask)
        state = self.activations.student_input(self.block, batch)
        return self.student.advance(self.block, state, batch.input_ids, batch.mask)


class HeadStage(Stage):
    """The final norm and the head learn the teacher's logits; the backbone stays fixed.

    No tensor of shape [batch, seq, vocab] exists: the loss is formed some positions at a time, on
    valid positions only.

    Args:
        activations: Where both models' final states come from.
        loss_fn: The loss on logits.
        loss_weight: Factor on the loss.
    """

    def __init__(self, activations: Activations, loss_fn: Loss, *, loss_weight: float) -> None:
        super().__init__("lm-head", activations.student)
        self.activations = activations
        self.teacher = activations.teacher
        self.loss_fn = loss_fn
        self.loss_weight = loss_weight
        self._heads_are_linear = head_is_linear(self.teacher), head_is_linear(self.student)
        self._teacher_weight: Tensor | None = None
        # Padded rows of a vocabulary stand for no token.
        self._shared_rows = min(self.teacher.vocab_size, self.student.vocab_size)

    def modules(self) -> dict[str, nn.Module]:
        """The final norm and the head."""
        return {"final_norm": self.student.final_norm, "lm_head": self.student.lm_head}

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the weighted mean logit loss over valid positions."""
        state = batch.valid(self.activations.student_input(self.student.num_blocks, batch))
        teacher_logits = self._teacher_logits(batch)
        if self._heads_are_linear[1]:
            head, rows = self.student.lm_head, self._shared_rows
            mean = chunked_linear_loss(
                self.loss_fn,
                self.student.head_features(state),
                first_rows(head.weight, rows),
                None if head.bias is None else first_rows(head.bias, rows),
                teacher_logits,
            )
        else:
            student_logits = positionwise_logits(self.student, state, self._shared_rows)
            mean = checkpointed_loss(self.loss_fn, student_logits, teacher_logits, len(state))
        return self.loss_weight * mean

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch) -> Logits:
        last = self.teacher.num_blocks - 1
        state = batch.valid(self.activations.teacher_output(last, batch))
        rows = self._shared_rows
        if not self._heads_are_linear[0]:
            return positionwise_logits(self.teacher, state, rows)
        head = self.teacher.lm_head
        bias = None if head.bias is None else first_rows(head.bias, rows)
        features = self.teacher.final_norm(state)
        dtype = product_dtype(features)
        if self._teacher_weight is None or self._teacher_weight.dtype != dtype:
            self._teacher_weight = first_rows(head.weight, rows).to(
                dtype
            )  # cast once, not at every step
        return linear_head(features, self._teacher_weight, bias)


def first_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first rows; the tensor itself if it has no more, which spares a copy of its gradient."""
    return tensor if len(tensor) == rows else tensor[:rows]


def positionwise_logits(stack: BlockStack, state: Tensor, rows: int) -> Logits:
    """The model's own logits at ranges of positions of ``state``, [positions, d_state]."""
    return lambda positions: logits_at(stack, state[positions])[:, :rows]


@dataclass
class FitStatistics:
    """Streaming sums for the relative error ``SSE / SS about the mean`` of a prediction.

    Kept on the device of the states: reading them would make an accelerator wait.
    """

    count: int = 0
    squared_error: Tensor | float = 0.0
    squared_norm: Tensor | float = 0.0
    total: Tensor | float = 0.0

    @torch.no_grad()
    def add(
        self, predicted: Float[Tensor, "positions dim"], target: Float[Tensor, "positions dim"]
    ) -> None:
        """Count one batch of predictions."""
        self.count += target.shape[0]
        target = target.float()
        # Sums over batches are float64 where the device has it.
        wide = torch.float32 if target.device.type == "mps" else torch.float64
        self.squared_error += torch.linalg.vector_norm(predicted.float() - target).to(wide).square()
        self.squared_norm += torch.linalg.vector_norm(target).to(wide).square()
        self.total += target.sum(0).to(wide)

    def relative_error(self) -> float:
        """The squared error as a share of the target's variation about its mean."""
        if self.count == 0:
            return float("nan")
        about_mean = torch.as_tensor(self.total).square().sum() / self.count
        variation = float(self.squared_norm - about_mean)
        return float(self.squared_error) / variation if variation > 0 else float("nan")


def embedding_modules(stack: BlockStack) -> dict[str, nn.Module]:
    """The modules of a causal LM that turn token ids into what enters block 0.

    Found by exclusion: every module with parameters that is neither a block, nor the final norm,
    nor the head, nor contains one of them.
    """
    blocks = [stack.block(i) for i in range(stack.num_blocks)]
    others = {id(m) for part in (*blocks, stack.final_norm, stack.lm_head) for m in part.modules()}
    found: dict[str, nn.Module] = {}
    for name, module in stack.model.named_modules():
        inside = any(name.startswith(f"{taken}.") for taken in found)
        contains = any(id(child) in others for child in module.modules())
        if not inside and not contains and any(True for _ in module.parameters()):
            found[f"embeddings.{name}"] = module
    return found
