"""What is trained, on what, against what.

A stage names its trainable tensors and turns a batch into a loss. It knows neither optimizers nor
loops; ``trainers/base_trainer.py`` runs it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.runtime.ranks import Ranks
from distillation.activations import Activations
from distillation.batch import Batch
from distillation.block_inputs import StudentInputs
from distillation.fit_statistics import FitStatistics
from distillation.least_squares import RIDGE, LeastSquares
from distillation.losses import DistillationLoss
from stitching_layers import StitchingLayer

START_RIDGE = 1e-3
"""Of a stitch whose block is still to learn: weights on directions of hardly any variance would
amplify every step of the block."""

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
        self.progress = 0.0
        """Share of the stage's steps that are done, in [0, 1); the loop keeps it."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The modules in training, by a name that is unique in the stage."""

    @abstractmethod
    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the mean loss over the batch's valid positions, with its graph."""

    def held_out_loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The loss that tells a good epoch from a better one, on data not trained on."""
        return self.loss(batch)

    def stand_by(self, batch: Batch) -> None:  # noqa: B027 - most processes are on their own
        """Called instead of a loss where a process has no position of a batch to learn from.

        Takes part in what only all processes of a run together can do.
        """

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

    def forget_states(self) -> None:  # noqa: B027 - a stage may keep none
        """Called when windows seen so far are not seen again in this stage."""

    def compilable(self) -> list[nn.Module]:
        """The modules in training whose forward passes are worth compiling."""
        return []

    def start_epoch(self) -> None:  # noqa: B027 - most stages measure nothing per epoch
        """Called before each epoch."""

    def summary(self, ranks: Ranks) -> dict[str, float]:
        """What the stage measured in its last epoch, besides the loss, over all processes."""
        return {}

    def measured(self, ranks: Ranks) -> dict[str, Tensor]:
        """What each process has measured in this epoch so far, to be saved."""
        return {}

    def go_on_measuring(self, measured: dict[str, Tensor], ranks: Ranks) -> None:  # noqa: B027
        """Take up what :meth:`measured` returned."""


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
        train_stitch: Whether the stitch learns too.
        inputs: What enters the block; None is what the blocks before it make.
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
        train_stitch: bool = True,
        inputs: StudentInputs | None = None,
    ) -> None:
        super().__init__(f"block-{block:02d}", activations.student)
        self.block = block
        self.teacher_block = teacher_block
        self.activations = activations
        self.loss_fn = loss_fn
        self.stitch = stitch
        self.freeze_previous = freeze_previous
        self.first_position = first_position
        self.train_stitch = train_stitch
        self.inputs = StudentInputs(activations) if inputs is None else inputs
        self.start_epoch()

    def modules(self) -> dict[str, nn.Module]:
        """The block, and its stitch if that learns; unless frozen, all before it and embeddings."""
        first = self.block if self.freeze_previous else 0
        found = {f"blocks.{i}": self.student.block(i) for i in range(first, self.block + 1)}
        if first == 0:
            found.update(embedding_modules(self.student))
        if self.stitch is not None and self.train_stitch:
            found["stitch"] = self.stitch
        return found

    def forget_states(self) -> None:
        """Make room for the states of other windows."""
        self.activations.forget()

    def compilable(self) -> list[nn.Module]:
        """The student block."""
        return [self.student.block(self.block)]

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the mean hidden-state loss over the compared positions."""
        student, teacher = self.states(batch)
        compared = batch.without_first(self.first_position)
        student, teacher = compared.valid(student), compared.valid(teacher)
        if torch.is_grad_enabled():  # validation is no part of the epoch
            self._fit.add(*comparable(self.loss_fn, student.detach(), teacher))
        return self.loss_fn(student, teacher)

    def stand_by(self, batch: Batch) -> None:
        """Take part in the teacher's pass through this batch."""
        self.activations.stand_by(self.teacher_block, batch)
        if self.block and self.freeze_previous:
            self.inputs.stand_by(self.block, batch)

    def count(self, batch: Batch) -> int:
        """The compared positions."""
        return batch.without_first(self.first_position).num_valid

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the stitched student states and the teacher's, both [batch, seq, d_teacher]."""
        student, teacher = self._hidden_states(batch)
        return self.stitched(student), teacher

    def stitched(
        self, hidden: Float[Tensor, "batch seq d_student"]
    ) -> Float[Tensor, "batch seq d_teacher"]:
        """The student block's hidden states at the teacher's width."""
        return hidden if self.stitch is None else self.stitch(hidden)

    @torch.no_grad()
    def fit_stitch(self, batches: Iterable[Batch], max_tokens: int) -> None:
        """Start the stitch as the best linear read-out of the block as it is now.

        Args:
            batches: Data to fit on.
            max_tokens: Stop after this many compared positions.
        """
        if self.stitch is None:
            return
        sums = LeastSquares()
        for batch in batches:
            student, teacher = self._hidden_states(batch)
            compared = batch.without_first(self.first_position)
            target = compared.valid(teacher)
            if isinstance(self.loss_fn, DistillationLoss):
                target = self.loss_fn.target(target)
            sums.add(compared.valid(student), target)
            if sums.count >= max_tokens:
                break
        set_stitch(self.stitch, sums, ridge=START_RIDGE)

    def start_epoch(self) -> None:
        """Forget the statistics of the epoch before."""
        width = self.activations.teacher.hidden_size
        self._fit = FitStatistics.empty(width, self.activations.teacher.device)

    def summary(self, ranks: Ranks) -> dict[str, float]:
        """The error relative to the best constant predictor (1.0), over the last epoch."""
        return {"relative_error": self._fit.summed(ranks).relative_error()}

    def measured(self, ranks: Ranks) -> dict[str, Tensor]:
        """The sums of this epoch's relative error, in each process."""
        return self._fit.tensors(ranks)

    def go_on_measuring(self, measured: dict[str, Tensor], ranks: Ranks) -> None:
        """Take up this process's own, or in the first one the sums of another number of them."""
        self._fit = FitStatistics.of(measured, ranks)

    def _hidden_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student block's hidden states, without a stitch, and the teacher's."""
        teacher = self.activations.teacher_output(self.teacher_block, batch)
        state = self._student_output(batch)
        self.activations.hand_over(self.block, batch, state)
        return self.student.hidden(state), teacher

    def _student_output(self, batch: Batch) -> Tensor:
        if self.block == 0 or not self.freeze_previous:
            return self.student.state_entering(self.block + 1, batch.input_ids, batch.mask)
        state = self.inputs.entering(self.block, batch, self.progress)
        return self.student.advance(self.block, state, batch.input_ids, batch.mask)


def standardises(loss_fn: Loss) -> TypeGuard[DistillationLoss]:
    """Whether a loss compares with standardised targets, which need the teacher's statistics."""
    return isinstance(loss_fn, DistillationLoss) and loss_fn.needs_statistics


def comparable(loss_fn: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and target in the space in which a loss compares them."""
    if isinstance(loss_fn, DistillationLoss):
        return loss_fn.comparable(student, teacher)
    return student, teacher


def set_stitch(stitch: StitchingLayer, sums: LeastSquares, ridge: float = RIDGE) -> None:
    """Make a stitch the solution of a regression; one without a bias leaves the intercept out."""
    weight, intercept = sums.regression(ridge)
    stitch.projection.weight.copy_(weight)
    if stitch.projection.bias is not None:
        stitch.projection.bias.copy_(intercept)


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
