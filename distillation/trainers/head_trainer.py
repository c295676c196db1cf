"""Trains the student's head on the teacher's logits."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from cleangpt.errors import UsageError
from cleangpt.heads import head_is_tied
from cleangpt.run_directory import RunDirectory
from distillation.config import DistillationConfig, LoopOptions, StageSettings
from distillation.head_fold import check_foldable, fold_head
from distillation.head_init import can_copy_head, copy_head, fit_head, untie_lm_head
from distillation.logit_stages import HeadStage
from distillation.losses import LogitDistillationLoss
from distillation.preflight import log_shared_rows
from distillation.stages import Loss
from distillation.trainers.base_trainer import BaseDistillationTrainer
from stitching_layers import StitchingLayer

logger = logging.getLogger(__name__)

HEAD_FIT_TOKENS = 131_072
"""Positions the head's least-squares start reads: hundreds per unknown at the usual widths."""


class HeadDistillationTrainer(BaseDistillationTrainer):
    """The student's final norm and head learn the teacher's logits; the backbone stays fixed.

    The student is trained in place and not saved; see
    :func:`~distillation.utils.save_checkpoint`. After a backbone trainer, give it an ``output_dir``
    of its own. A head tied to the embeddings is untied first: training it tied would move what
    feeds the frozen blocks. With ``head_tying="tie"`` it stays so, and only the final norm learns.
    ``logit_loss_fn`` may be replaced after construction, as ``hidden_state_loss_fn`` of the
    backbone trainer.

    Args:
        teacher_model: A HuggingFace causal LM. It is never changed.
        student_model: The model that learns, in place.
        tokenizer: The teacher's tokenizer, or None.
        train_dataloader: Yields ``{"input_ids", "attention_mask"}``.
        logit_loss_type: "kl_div", "mse" or "ce".
        logit_loss_temperature: Temperature of "kl_div" and "ce", > 0.
        logit_loss_weight: Factor on the logit loss, >= 0.
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
        log_shared_rows(self.teacher, self.student)
        self.logit_loss_fn: Loss = LogitDistillationLoss(logit_loss_type, logit_loss_temperature)
        # Whether the student's hidden states are the teacher's only through a stitch; a caller
        # who knows that they are the teacher's own sets False, and the head is copied then.
        self.stitched = True
        # The last block's trained stitch, from raw student to teacher states; head_start="fold"
        # folds it into the head.
        self.last_stitch: StitchingLayer | None = None

    def train_head(
        self,
        lm_head_epochs: int,
        lm_head_lr: float,
        lm_head_wd: float = 0.01,
        lm_head_max_grad_norm: float = 1.0,
        initialize_from_teacher: bool = True,
    ) -> dict[str, Any]:
        """Untie, initialise and train the head; a head that stays tied trains its norm only.

        Args:
            lm_head_epochs: Passes over the data; 0 keeps the head as initialised.
            lm_head_lr: Peak learning rate.
            lm_head_wd: Weight decay of the head's matrix.
            lm_head_max_grad_norm: Clipping threshold.
            initialize_from_teacher: Whether the head starts from the teacher's: copied where it
                fits, else as ``head_start`` says.

        Returns:
            ``head_loss`` (last epoch's mean, None if nothing was trained) and ``head``, a row with
            first, best and last loss.

        Raises:
            UsageError: If a value is out of range, or the student's head is not of the kind that
                ``head_tying`` or ``head_start`` asks for.
            NonFiniteError: If losses stay NaN or infinite.
        """
        settings = self.stage_settings(
            lm_head_epochs, lm_head_lr, lm_head_wd, lm_head_max_grad_norm
        )
        with self.running(1, self.overwrite):
            row = self._prepare_and_train(settings, initialize_from_teacher)
        return {"head_loss": row["last_loss"] if row["steps"] else None, "head": row}

    def stage_settings(
        self,
        lm_head_epochs: int,
        lm_head_lr: float,
        lm_head_wd: float,
        lm_head_max_grad_norm: float,
    ) -> StageSettings:
        """Check the data, the student and the arguments of :meth:`train_head`, before a run."""
        self.steps_per_epoch()
        if self.config.head_tying == "tie" and not head_is_tied(self.student):
            raise UsageError(
                "head_tying='tie' leaves the head the embedding matrix, and this student's head has"
                " weights of its own.",
                "Choose head_tying='untie', or build the student without head_rank and with the"
                " default final_norm.",
            )
        if self.config.head_start == "fold":
            check_foldable(self.student)
        return StageSettings(
            epochs=lm_head_epochs,
            lr=lm_head_lr,
            weight_decay=lm_head_wd,
            max_grad_norm=lm_head_max_grad_norm,
        )

    def _prepare_and_train(self, settings: StageSettings, from_teacher: bool) -> dict[str, Any]:
        if self.config.head_tying == "untie" and untie_lm_head(self.student):
            logger.info("The head was tied to the embeddings; it has its own weight from here on.")
        stage = HeadStage(
            self.activations, self.logit_loss_fn, loss_weight=self.config.logit_loss_weight
        )
        if from_teacher and not self.journal.began(stage.name):
            self._start_from_teacher()
        result = self.train_stage(stage, settings)
        if settings.epochs == 0:
            logger.info("The head stays as it starts: no epoch of its own was asked for.")
        return self.write_logit_row("head", result, "lm_head_lr")

    def _start_from_teacher(self) -> None:
        self.teacher_model.eval()
        self.student_model.eval()
        tied = head_is_tied(self.student)  # a copy would move what feeds the blocks
        if not tied and can_copy_head(self.teacher, self.student, stitched=self.stitched):
            copy_head(self.teacher, self.student)
            logger.info("The head starts as a copy of the teacher's final norm and head.")
        elif self.config.head_start == "fold":
            if self.last_stitch is None:
                raise UsageError(
                    "head_start='fold' folds the last block's stitching layer into the head, and"
                    " this run has none.",
                    "Keep use_stitching_layers=True, and stitch_equal_widths=True for a student as"
                    " wide as its teacher, or choose head_start='least_squares'.",
                )
            fold_head(self.last_stitch, self.teacher, self.student)
            logger.info("The head starts as the teacher's, folded with the last stitching layer.")
        else:
            with self.precision.autocast(self.device):
                fit_head(self.activations, self.batches_to_measure(), HEAD_FIT_TOKENS)
