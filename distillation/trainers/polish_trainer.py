"""Trains the whole student on the teacher's logits, and on its hidden states if that is asked."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from cleangpt.run_directory import RunDirectory
from distillation.activations import Activations
from distillation.config import DistillationConfig, LoopOptions, StageSettings
from distillation.head_init import untie_lm_head
from distillation.logit_stages import HiddenTargets, PolishStage
from distillation.losses import LogitDistillationLoss
from distillation.passing_states import PassingStates
from distillation.stages import Loss
from distillation.trainers.base_trainer import BaseDistillationTrainer

logger = logging.getLogger(__name__)


class PolishDistillationTrainer(BaseDistillationTrainer):
    """All of the student's parameters learn together, end to end.

    The last stage of a run: block by block each part has learnt its own task, and here they learn
    to work together (stage 3 of MOHAWK, Bick et al. 2024, arXiv:2408.10189). Alone, on a student as
    built or inherited, it is plain logit distillation. With a ``validation_dataloader`` the weights
    of the epoch with the lowest validation loss are kept.

    Args:
        teacher_model: A HuggingFace causal LM. It is never changed.
        student_model: The model that learns, in place.
        tokenizer: The teacher's tokenizer, or None.
        train_dataloader: Yields ``{"input_ids", "attention_mask"}``.
        logit_loss_type: "kl_div", "mse" or "ce".
        logit_loss_temperature: Temperature of "kl_div" and "ce", > 0.
        logit_loss_weight: Factor on the logit loss, >= 0, relative to hidden states'.
        device: Where the training runs.
        output_dir: The run's directory.
        log_interval: Optimizer steps between two logged lines.
        optimizer_cls: Called as ``optimizer_cls(parameter_groups, lr=...)``.
        validation_dataloader: Held-out batches, to keep the best weights by; None has none.
        overwrite: Whether an earlier run in ``output_dir`` may be deleted.
        **options: See :class:`~distillation.config.DistillationConfig`.
    """

    def __init__(
        self,
        teacher_model: nn.Module,
        student_model: nn.Module,
        tokenizer: Any,
        train_dataloader: Any,
        logit_loss_type: str = "kl_div",
        logit_loss_temperature: float = 2.0,
        logit_loss_weight: float = 1.0,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a device is immutable
        output_dir: str | Path = "./distilled_model",
        log_interval: int = 50,
        optimizer_cls: Callable[..., Any] = torch.optim.AdamW,
        *,
        validation_dataloader: Any = None,
        overwrite: bool = False,
        **options: Unpack[LoopOptions],
    ) -> None:
        config = DistillationConfig(
            logit_loss_type=logit_loss_type,
            logit_loss_temperature=logit_loss_temperature,
            logit_loss_weight=logit_loss_weight,
            log_interval=log_interval,
            **options,
        )
        super().__init__(
            teacher_model,
            student_model,
            tokenizer,
            train_dataloader,
            device=device,
            run=RunDirectory(output_dir),
            optimizer_cls=optimizer_cls,
            config=config,
            validation_dataloader=validation_dataloader,
        )
        self.overwrite = overwrite
        self.logit_loss_fn: Loss = LogitDistillationLoss(logit_loss_type, logit_loss_temperature)
        # The lessons on hidden states, which a backbone trainer knows; None has none.
        self.hidden_targets: HiddenTargets | None = None

    def train_polish(
        self,
        polish_epochs: int,
        polish_lr: float = 1e-3,
        polish_wd: float = 0.01,
        polish_max_grad_norm: float = 1.0,
    ) -> dict[str, Any]:
        """Train the whole student.

        Args:
            polish_epochs: Passes over the data.
            polish_lr: Peak learning rate.
            polish_wd: Weight decay of matrices.
            polish_max_grad_norm: Clipping threshold.

        Returns:
            ``polish_loss`` (last epoch's mean, None if nothing was trained) and ``polish``, a row
            with first, best and last loss.

        Raises:
            UsageError: If a value is out of range.
            NonFiniteError: If losses stay NaN or infinite.
        """
        settings = self.stage_settings(polish_epochs, polish_lr, polish_wd, polish_max_grad_norm)
        with self.running(1, self.overwrite):
            row = self._train(settings)
        return {"polish_loss": row["last_loss"] if row["steps"] else None, "polish": row}

    def stage_settings(
        self,
        polish_epochs: int,
        polish_lr: float,
        polish_wd: float,
        polish_max_grad_norm: float,
    ) -> StageSettings:
        """Check the data and the arguments of :meth:`train_polish`, before a run starts."""
        self.steps_per_epoch()
        return StageSettings(
            epochs=polish_epochs,
            lr=polish_lr,
            weight_decay=polish_wd,
            max_grad_norm=polish_max_grad_norm,
        )

    def stage(self, activations: Activations) -> PolishStage:
        """The stage as the settings describe it."""
        return PolishStage(
            activations,
            self.logit_loss_fn,
            loss_weight=self.config.logit_loss_weight,
            hidden=self.hidden_targets,
        )

    def states(self) -> Activations:
        """Where the stage's states come from: all levels at once if hidden states are taught."""
        if self.hidden_targets is None:
            return self.activations
        levels = [*self.hidden_targets.layer_map, self.teacher.num_blocks - 1]
        return PassingStates(self.activations, levels)

    def _train(self, settings: StageSettings) -> dict[str, Any]:
        if self.config.head_tying == "untie" and untie_lm_head(self.student):
            logger.info("The head was tied to the embeddings; it has its own weight from here on.")
        states = self.states()
        try:
            result = self.train_stage(self.stage(states), settings)
        finally:
            if states is not self.activations:
                states.forget()
        return self.write_logit_row("polish", result, "polish_lr")
