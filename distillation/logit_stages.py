"""The stages that learn the teacher's logits: the head alone, and the whole student."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.heads import head_factors, head_is_linear, head_is_tied, logits_at
from distillation.activations import Activations
from distillation.batch import Batch
from distillation.losses.chunked import (
    Logits,
    checkpointed_loss,
    chunked_linear_loss,
    linear_head,
    product_dtype,
)
from distillation.stages import Loss, Stage
from stitching_layers import StitchingLayers


class HeadStage(Stage):
    """The final norm and the head learn the teacher's logits; the backbone stays fixed.

    No tensor of shape [batch, seq, vocab] exists: the loss is formed some positions at a time, on
    valid positions only.

    Args:
        activations: Where both models' final states come from.
        loss_fn: The loss on logits.
        loss_weight: Factor on the loss.
        name: The stage's name.
    """

    def __init__(
        self,
        activations: Activations,
        loss_fn: Loss,
        *,
        loss_weight: float,
        name: str = "lm-head",
    ) -> None:
        super().__init__(name, activations.student)
        self.activations = activations
        self.teacher = activations.teacher
        self.loss_fn = loss_fn
        self.loss_weight = loss_weight
        self._heads_are_linear = head_is_linear(self.teacher), head_is_linear(self.student)
        self._teacher_weight: Tensor | None = None
        # Padded rows of a vocabulary stand for no token.
        self._shared_rows = min(self.teacher.vocab_size, self.student.vocab_size)

    def modules(self) -> dict[str, nn.Module]:
        """The final norm and the head; the norm alone where the head is the embeddings."""
        modules: dict[str, nn.Module] = {"final_norm": self.student.final_norm}
        if not head_is_tied(self.student):
            modules["lm_head"] = self.student.lm_head
        return modules

    def compilable(self) -> list[nn.Module]:
        """The loss, where its kernel is used: on an accelerator."""
        kernel = getattr(self.loss_fn, "kernel", None)
        on_cpu = self.student.device.type == "cpu"
        return [kernel] if isinstance(kernel, nn.Module) and not on_cpu else []

    def forget_states(self) -> None:
        """Make room for the states of other windows."""
        self.activations.forget()

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the weighted mean logit loss over valid positions."""
        return self.logit_loss(
            batch, self.activations.student_input(self.student.num_blocks, batch)
        )

    def stand_by(self, batch: Batch) -> None:
        """Take part in the teacher's pass through this batch."""
        self.activations.stand_by(self.teacher.num_blocks - 1, batch)

    def logit_loss(self, batch: Batch, last_state: Tensor) -> Float[Tensor, ""]:
        """The same for given raw outputs of the student's last block, [batch, seq, d_state]."""
        state = batch.valid(last_state)
        teacher_logits = self._teacher_logits(batch)
        if self._heads_are_linear[1]:
            head, rows = self.student.lm_head, self._shared_rows
            features = self.student.head_features(state)
            factors = head_factors(head)
            if factors is not None:  # of low rank: the first factor once, not for every word
                features, head = factors[0](features), factors[1]
            mean = chunked_linear_loss(
                self.loss_fn,
                features,
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
            # Cast once, not at every step.
            self._teacher_weight = first_rows(head.weight, rows).to(dtype)
        return linear_head(features, self._teacher_weight, bias)


@dataclass(frozen=True)
class HiddenTargets:
    """What the polish keeps of the hidden states' lessons.

    Args:
        layer_map: Entry m is the teacher block that student block m learns from.
        losses: The hidden-state loss of each student block.
        stitches: The projection of each; None compares the states as they are.
        weight: Factor on their mean.
        fade: Whether it falls linearly to zero.
        first_position: Earlier positions of each window are not compared.
        train_stitches: Whether the projections learn too.
    """

    layer_map: Sequence[int]
    losses: Sequence[Loss]
    stitches: StitchingLayers | None
    weight: float
    fade: bool
    first_position: int = 0
    train_stitches: bool = True


class PolishStage(HeadStage):
    """The whole student learns the teacher's logits, and its hidden states if that is asked.

    Args:
        activations: Where the teacher's states come from.
        loss_fn: The loss on logits.
        loss_weight: Factor on it.
        hidden: The lessons on hidden states; None has none.
    """

    def __init__(
        self,
        activations: Activations,
        loss_fn: Loss,
        *,
        loss_weight: float,
        hidden: HiddenTargets | None = None,
    ) -> None:
        super().__init__(activations, loss_fn, loss_weight=loss_weight, name="polish")
        self.hidden = hidden

    def modules(self) -> dict[str, nn.Module]:
        """The whole student, and the stitches it is read through."""
        modules: dict[str, nn.Module] = {"student": self.student.model}
        hidden = self.hidden
        if hidden is not None and hidden.stitches is not None and hidden.train_stitches:
            modules["stitches"] = hidden.stitches
        return modules

    def compilable(self) -> list[nn.Module]:
        """The loss and all student blocks."""
        blocks = [self.student.block(index) for index in range(self.student.num_blocks)]
        return [*super().compilable(), *blocks]

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the weighted logit loss plus the weighted mean of the blocks' hidden losses."""
        if self.hidden is None:
            return self.held_out_loss(batch)
        states = self.student.block_states(batch.input_ids, batch.mask)
        weight = self.hidden.weight * (1 - self.progress if self.hidden.fade else 1.0)
        return self.logit_loss(batch, states[-1]) + weight * self._hidden_loss(batch, states[1:])

    def held_out_loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The logit loss alone: the weight of the hidden states' may change from epoch to epoch."""
        last = self.student.state_entering(self.student.num_blocks, batch.input_ids, batch.mask)
        return self.logit_loss(batch, last)

    def _hidden_loss(self, batch: Batch, states: Sequence[Tensor]) -> Tensor:
        assert self.hidden is not None
        compared = batch.without_first(self.hidden.first_position)
        total = states[0].new_zeros((), dtype=torch.float32)
        for block, (target, loss_fn) in enumerate(
            zip(self.hidden.layer_map, self.hidden.losses, strict=True)
        ):
            student = compared.valid(self.student.hidden(states[block]))
            if self.hidden.stitches is not None:
                student = self.hidden.stitches[block](student)
            teacher = compared.valid(self.activations.teacher_output(target, batch))
            total = total + loss_fn(student, teacher)
        return total / len(self.hidden.losses)


def first_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first rows; the tensor itself if it has no more, which spares a copy of its gradient."""
    return tensor if len(tensor) == rows else tensor[:rows]


def positionwise_logits(stack: BlockStack, state: Tensor, rows: int) -> Logits:
    """The model's own logits at ranges of positions of ``state``, [positions, d_state]."""
    return lambda positions: logits_at(stack, state[positions])[:, :rows]


@contextmanager
def untied_for_now(stack: BlockStack) -> Iterator[None]:
    """Give a tied head a weight of its own inside the block."""
    head = stack.lm_head
    shared = head.weight if head_is_tied(stack) else None
    if shared is not None:
        head.weight = nn.Parameter(shared.detach().clone())
    try:
        yield
    finally:
        if shared is not None:
            head.weight = shared
