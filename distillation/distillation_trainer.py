"""The order of stages: blocks, then the head, then the whole, then the finished student on disk.

What a stage trains is in ``stages.py``, how it is trained in ``trainers/base_trainer.py``.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from cleangpt.checkpoints import Checkpoints
from cleangpt.heads import head_is_tied
from cleangpt.metrics_log import RunProgress
from cleangpt.run_directory import RunDirectory
from distillation.config import LoopOptions, PerBlock, StageSettings, by_stage, spread
from distillation.displays import shown_trainer
from distillation.finished_run import fill_folder, finish, finished_results, save_student
from distillation.head_init import tie_lm_head, untie_lm_head
from distillation.journal import Journal, check_same_settings
from distillation.logit_stages import HiddenTargets
from distillation.overfit_gate import check_run_learns
from distillation.passes import counted_epochs, passes_of
from distillation.plan import RunPlan, planned_seconds
from distillation.planning import memory_explained, plan_training
from distillation.trainers.backbone_trainer import BackboneDistillationTrainer
from distillation.trainers.base_trainer import BaseDistillationTrainer
from distillation.trainers.head_trainer import HeadDistillationTrainer
from distillation.trainers.polish_trainer import PolishDistillationTrainer

logger = logging.getLogger(__name__)


class DistillationTrainer:
    """Distils a teacher into a student: the blocks in order, then the head, then the whole.

    ``backbone_trainer``, ``head_trainer`` and ``polish_trainer`` may be replaced before
    :meth:`train` is called.

    Args:
        teacher_model: A HuggingFace causal LM. It is never changed.
        student_model: The model that learns, in place: one of ours, or a HuggingFace causal LM.
        tokenizer: The teacher's tokenizer; saved beside the student. None if there is none.
        train_dataloader: Yields ``{"input_ids", "attention_mask"}`` of shape [batch, seq].
        device: Where the training runs; both models are moved there.
        output_dir: The run's directory.
        log_interval: Optimizer steps between two logged lines.
        distill_loss_type: Loss on hidden states: "mse", "kl_div", "nmse", "cosine", "smooth_l1" or
            "whiten"; see :class:`~distillation.losses.DistillationLoss`.
        distill_loss_temperature: Temperature of the hidden "kl_div", > 0.
        use_stitching_layers: Whether each block learns through a projection to the teacher's width;
            needed when the widths differ.
        stitching_layer_bias: Whether the projections have a bias.
        freeze_previous_blocks: Whether blocks before the one in training stay fixed.
        logit_loss_type: Loss on logits: "kl_div", "mse" or "ce" (teacher's most probable token).
        logit_loss_temperature: Temperature of "kl_div" and "ce", > 0.
        logit_loss_weight: Factor on the logit loss, relative to the hidden-state loss.
        optimizer_cls: Called as ``optimizer_cls(parameter_groups, lr=...)``.
        validation_dataloader: Held-out batches of the same form. Each stage then keeps the weights
            with the lowest loss on them, at its start or after an epoch. None keeps the last.
        overwrite: Whether an earlier run in ``output_dir`` may be deleted.
        resume: Whether to go on with a run that was stopped in ``output_dir``; it ends with the
            bits of one that never was. Without such a run one begins; a finished one is returned.
        keep_start: Whether to save the untrained student too, in ``start/``, for comparison.
        show_progress: Whether to draw bars; None draws them on a terminal and in a notebook.
        **options: ``init_from_teacher``, ``stitch_equal_widths``, ``stitch_start``,
            ``train_stitches``, ``head_start``, ``head_tying``, ``polish_hidden_weight``,
            ``polish_hidden_fade``, ``audit_tokens``, ``early_stop_patience``, ``overfit_gate``,
            ``gradient_accumulation_steps``, ``lr_schedule``, ``warmup_ratio``, ``min_lr_ratio``,
            ``max_nonfinite_in_a_row``, ``first_hidden_position``,
            ``activation_cache``, ``activation_cache_gb``, ``activation_dtype``,
            ``keep_activations``, ``schedule``, ``block_inputs``, ``layer_map``, ``blocks``,
            ``precision``, ``compile_blocks``, ``checkpoint_minutes``, ``checkpoint_steps``,
            ``hidden_state_pictures``, ``track``, ``seed``: see
            :class:`~distillation.config.DistillationConfig`.

    Raises:
        UsageError: If settings are out of range, or widths or depths cannot work together.
        InputError: If a model's structure is not understood, or vocabularies do not match.
    """

    def __init__(
        self,
        teacher_model: nn.Module,
        student_model: nn.Module,
        tokenizer: Any,
        train_dataloader: Any,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a device is immutable
        output_dir: str | Path = "./distilled_model",
        log_interval: int = 50,
        distill_loss_type: str = "mse",
        distill_loss_temperature: float = 1.0,
        use_stitching_layers: bool = True,
        stitching_layer_bias: bool = True,
        freeze_previous_blocks: bool = True,
        logit_loss_type: str = "kl_div",
        logit_loss_temperature: float = 2.0,
        logit_loss_weight: float = 1.0,
        optimizer_cls: Callable[..., Any] = torch.optim.AdamW,
        *,
        validation_dataloader: Any = None,
        overwrite: bool = False,
        resume: bool = False,
        keep_start: bool = False,
        show_progress: bool | None = None,
        **options: Unpack[LoopOptions],
    ) -> None:
        self.student_model = student_model
        self.tokenizer = tokenizer
        self.run = RunDirectory(output_dir)
        self.overwrite = overwrite
        self.resume = resume
        self.keep_start = keep_start
        self.show_progress = show_progress
        self._planned: dict[str, Any] | None = None
        models = (teacher_model, student_model, tokenizer, train_dataloader)
        shared: dict[str, Any] = {
            "device": device,
            "output_dir": output_dir,
            "log_interval": log_interval,
            "optimizer_cls": optimizer_cls,
            "validation_dataloader": validation_dataloader,
            **options,
        }
        self.backbone_trainer = BackboneDistillationTrainer(
            *models,
            distill_loss_type=distill_loss_type,
            distill_loss_temperature=distill_loss_temperature,
            use_stitching_layers=use_stitching_layers,
            stitching_layer_bias=stitching_layer_bias,
            freeze_previous_blocks=freeze_previous_blocks,
            **shared,
        )
        shared |= {
            "logit_loss_type": logit_loss_type,
            "logit_loss_temperature": logit_loss_temperature,
            "logit_loss_weight": logit_loss_weight,
        }
        self.head_trainer = HeadDistillationTrainer(*models, **shared)
        self.polish_trainer = PolishDistillationTrainer(*models, **shared)

    def train(
        self,
        epochs_per_block: int | Sequence[int],
        lr_per_block: PerBlock,
        wd_per_block: PerBlock = 0.01,
        max_grad_norm_per_block: PerBlock = 1.0,
        train_lm_head: bool = True,
        lm_head_epochs: int = 1,
        lm_head_lr: float = 1e-4,
        lm_head_wd: float = 0.01,
        lm_head_max_grad_norm: float = 1.0,
        initialize_head_from_teacher: bool = True,
        *,
        polish_epochs: int = 0,
        polish_lr: float = 1e-3,
        polish_wd: float = 0.01,
        polish_max_grad_norm: float = 1.0,
    ) -> dict[str, Any]:
        """Run all stages and write the student.

        Args:
            epochs_per_block: Passes over the data per block; a number or one per block.
            lr_per_block: Peak learning rate per block; a number or one per block.
            wd_per_block: Weight decay of matrices; a number or one per block.
            max_grad_norm_per_block: Clipping threshold; a number or one per block.
            train_lm_head: Whether the head phase runs. Without it the head stays as built or, if
                it is tied, as block 0 leaves the embeddings.
            lm_head_epochs: Passes over the data in the head phase.
            lm_head_lr: Peak learning rate of the head phase.
            lm_head_wd: Weight decay of the head's matrix.
            lm_head_max_grad_norm: Clipping threshold of the head phase.
            initialize_head_from_teacher: Whether the head starts from the teacher's.
            polish_epochs: Passes over the data in which the whole student learns, at the end; 0
                leaves this stage out.
            polish_lr: Peak learning rate of the polish.
            polish_wd: Weight decay of matrices in the polish.
            polish_max_grad_norm: Clipping threshold of the polish.

        Returns:
            ``backbone_losses`` (last epoch's mean loss per block), ``head_loss`` and
            ``polish_loss`` (the same for the head and the whole, None without that stage),
            ``blocks``, ``head`` and ``polish`` (rows with first, best and last loss),
            ``output_dir``, ``student_path``, ``skipped_batches`` and ``seconds``; a notebook
            shows a table and a curve of the losses.

        Raises:
            UsageError: If ``output_dir`` holds a run and ``overwrite`` is False, or a value is out
                of range.
            NonFiniteError: If losses stay NaN or infinite.
            EnvironmentProblem: If ``output_dir`` cannot be written.
        """
        backbone, head, polish = by_stage(dict(locals()))
        return self._run_stages(
            backbone,
            head if train_lm_head else None,
            polish if polish_epochs else None,
            initialize_head_from_teacher,
        )

    def plan(
        self,
        epochs_per_block: int | Sequence[int],
        train_lm_head: bool = True,
        lm_head_epochs: int = 1,
        polish_epochs: int = 0,
    ) -> RunPlan:
        """Tell what :meth:`train` with these arguments will cost, before it starts.

        Takes about two seconds; nothing is trained. Models on PyTorch's "meta" device will do.

        Raises:
            UsageError: If the train_dataloader does not tell how much it holds.
        """
        backbone = self.backbone_trainer
        epochs = spread("epochs_per_block", epochs_per_block, backbone.student.num_blocks)
        planned = plan_training(
            backbone,
            [
                int(str(own)) if block in backbone.learning_blocks else 0
                for block, own in enumerate(epochs)
            ],
            lm_head_epochs if train_lm_head else None,
            polish_epochs,
        )
        self._planned = planned.summary()
        return planned

    def _run_stages(
        self,
        backbone: dict[str, Any],
        head: dict[str, Any] | None,
        polish: dict[str, Any] | None,
        head_from_teacher: bool,
    ) -> dict[str, Any]:
        started_at = time.perf_counter()
        own = self._stage_settings(backbone, head, polish)
        stages, config = len(own), self.backbone_trainer.config
        settings = self._settings(backbone, head, polish, head_from_teacher)
        if self.resume:
            about = self.backbone_trainer.about_run()
            done = finished_results(self.run, about, settings, self.backbone_trainer.student)
            if done is not None:
                return done
        fill = partial(fill_folder, self.student_model, self.tokenizer)
        progress = RunProgress(stages, self.show_progress, planned_seconds(self._planned))
        self.backbone_trainer.check_disk_room(
            trains_all=polish is not None, overwrite=self.overwrite, keeps_start=self.keep_start
        )
        journal = Journal(
            {"student": self.student_model},
            self.backbone_trainer.ranks,
            config.checkpoint_minutes,
            config.checkpoint_steps,
            lambda: head_is_tied(self.backbone_trainer.student),
        )
        for trainer in self._trainers:
            trainer.run, trainer.journal = self.run, journal
        with (
            journal.stop.listening(),
            self.backbone_trainer.running(stages, self.overwrite, self.resume),
            memory_explained(self.backbone_trainer, head, polish),
        ):
            for trainer in self._trainers:
                trainer.progress = progress
            folder = self.run.path / "checkpoints"
            checkpoints = Checkpoints(folder, self.run.run_id, writes=self.run.writes)
            goes_on = journal.open(checkpoints, self.run.metrics, resume=self.resume)
            self.run.note(total_steps=self._total_steps(own), planned=self._planned)
            self._write_start(settings, fill, goes_on)
            self._prepare(journal, goes_on)
            if config.overfit_gate and not goes_on:
                check_run_learns(
                    self.backbone_trainer,
                    None if head is None else self.head_trainer,
                    None if polish is None else self.polish_trainer,
                )
            results = self._train_stages(backbone, head, polish, head_from_teacher)
            layer_map = self.backbone_trainer.layer_map
            save_student(self.run, self.student_model, fill, layer_map, results)
            results = finish(self.run, results, time.perf_counter() - started_at)
        checkpoints.remove()
        return results

    def _prepare(self, journal: Journal, goes_on: bool) -> None:
        """Bring the models to where the stages begin, or to where the run was stopped."""
        backbone = self.backbone_trainer
        if self.resume and backbone.is_prepared and not goes_on:
            logger.warning("Nothing was saved: the run begins from the student as it is now.")
        backbone.prepare()
        if backbone.stitches is not None:
            journal.modules["stitches"] = backbone.stitches
        if goes_on:
            (tie_lm_head if journal.was_tied else untie_lm_head)(backbone.student)
            journal.put_back()
        self._share_what_is_known()

    def _write_start(
        self, settings: dict[str, Any], fill: Callable[[Path], object], goes_on: bool
    ) -> None:
        """Write down everything that decides this run, and its student before it if asked."""
        if goes_on:
            check_same_settings(self.run.path / "config.json", settings)
        self.run.write_json("config.json", settings)
        self.run.write_manifest()
        if self.keep_start and not goes_on:
            self.run.write_folder("start", fill)

    def _stage_settings(
        self,
        backbone: dict[str, Any],
        head: dict[str, Any] | None,
        polish: dict[str, Any] | None,
    ) -> list[StageSettings]:
        """Check the arguments of all stages, before any of them runs."""
        own = self.backbone_trainer.stage_settings(**backbone)
        if head is not None:
            own.append(self.head_trainer.stage_settings(**head))
        if polish is not None:
            own.append(self.polish_trainer.stage_settings(**polish))
        return own

    def _total_steps(self, own: Sequence[StageSettings]) -> int:
        backbone = self.backbone_trainer
        epochs, blocks = [stage.epochs for stage in own], backbone.student.num_blocks
        counted = counted_epochs(backbone.config.schedule, epochs[:blocks], epochs[blocks:])
        return counted * backbone.steps_per_epoch() * passes_of(backbone.train_dataloader)

    def _train_stages(
        self,
        backbone: dict[str, Any],
        head: dict[str, Any] | None,
        polish: dict[str, Any] | None,
        head_from_teacher: bool,
    ) -> dict[str, Any]:
        results = self.backbone_trainer.train_backbone(**backbone)
        results.update(head_loss=None, head=None, polish_loss=None, polish=None)
        if head is not None:
            self.head_trainer.last_stitch = self.backbone_trainer.last_read_out()
            results.update(
                self.head_trainer.train_head(**head, initialize_from_teacher=head_from_teacher)
            )
        if polish is not None:
            results.update(self.polish_trainer.train_polish(**polish))
            self.backbone_trainer.stitches_are_stale = True
            self.backbone_trainer.write_stitches()
        return results

    __repr__ = shown_trainer

    @property
    def _trainers(self) -> list[BaseDistillationTrainer]:
        return [self.backbone_trainer, self.head_trainer, self.polish_trainer]

    def _share_what_is_known(self) -> None:
        """Give the later stages the states that are kept, and what the backbone's stitches say."""
        backbone = self.backbone_trainer
        for trainer in (self.head_trainer, self.polish_trainer):
            trainer.activations = backbone.activations
        self.head_trainer.stitched = backbone.stitches is not None
        weight = backbone.config.polish_hidden_weight
        if weight:
            self.polish_trainer.hidden_targets = HiddenTargets(
                backbone.layer_map,
                [backbone.level_loss(block) for block in range(len(backbone.layer_map))],
                backbone.stitches,
                weight,
                backbone.config.polish_hidden_fade,
                backbone.config.first_hidden_position,
                backbone.trains_stitches,
            )

    def _settings(
        self,
        backbone: dict[str, Any],
        head: dict[str, Any] | None,
        polish: dict[str, Any] | None,
        head_from_teacher: bool,
    ) -> dict[str, Any]:
        """Everything that decides this run."""
        logit_settings = {
            name: value
            for name, value in asdict(self.head_trainer.config).items()
            if name.startswith("logit_")
        }
        return {
            **asdict(self.backbone_trainer.config),
            **logit_settings,
            **backbone,
            "train_lm_head": head is not None,
            **(head or {}),
            "initialize_head_from_teacher": head_from_teacher,
            **(polish or {"polish_epochs": 0}),
        }
