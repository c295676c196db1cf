"""Trains the student's blocks, one after the other."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from cleangpt.checkpoints import refuse_nonfinite
from cleangpt.run_directory import RunDirectory
from cleangpt.sharding import sharded_blocks
from distillation.activations import Activations
from distillation.audit import TeacherAudit, audit_teacher
from distillation.block_inputs import check_inputs, choose_inputs, share_basis
from distillation.config import (
    DistillationConfig,
    LoopOptions,
    PerBlock,
    StageSettings,
    block_settings,
)
from distillation.layer_map import choose_blocks, choose_layer_map
from distillation.losses import DistillationLoss
from distillation.passing_states import PassingStates
from distillation.pictures import draw_block
from distillation.preflight import check_widths, needs_stitches
from distillation.read_outs import READ_OUT_TOKENS, fit_read_outs
from distillation.shared_basis import BASES, find_basis
from distillation.stages import BlockStage, Loss, Stage, standardises
from distillation.teacher_init import init_from_teacher
from distillation.trainers.base_trainer import BaseDistillationTrainer
from distillation.trainers.block_rows import COLUMNS, ROW, block_row, chained_errors, shown_row
from distillation.trainers.decoupled import DecoupledBlocks
from distillation.trainers.stage_loop import StageResult, derived_seed
from stitching_layers import StitchingLayer, StitchingLayers, stitches_to_bytes

logger = logging.getLogger(__name__)

STITCH_FIT_TOKENS = 16_384


class BackboneDistillationTrainer(BaseDistillationTrainer):
    """Block m of the student learns the raw output of teacher block ``layer_map[m]``.

    The student is trained in place and not saved; see
    :func:`~distillation.utils.save_checkpoint`. Each block learns through its own stitching layer,
    from the states its frozen predecessors give it. May be subclassed to replace
    ``hidden_state_loss_fn`` after construction: any callable ``(student, teacher) -> mean over
    positions`` on tensors of shape [positions, d_teacher].

    Args:
        teacher_model: A HuggingFace causal LM. It is never changed.
        student_model: The model that learns, in place.
        tokenizer: The teacher's tokenizer, or None.
        train_dataloader: Yields ``{"input_ids", "attention_mask"}``.
        distill_loss_type: "mse" or "kl_div".
        distill_loss_temperature: Temperature of "kl_div", > 0.
        use_stitching_layers: Whether to project the student's states to the teacher's width.
        stitching_layer_bias: Whether the projections have a bias.
        freeze_previous_blocks: Whether blocks before the one in training stay fixed.
        device: Where the training runs.
        output_dir: The run's directory.
        log_interval: Optimizer steps between two logged lines.
        optimizer_cls: Called as ``optimizer_cls(parameter_groups, lr=...)``.
        validation_dataloader: Held-out batches, to keep the best weights by; None has none.
        overwrite: Whether an earlier run in ``output_dir`` may be deleted.
        **options: See :class:`~distillation.config.DistillationConfig`.

    Raises:
        UsageError: If widths differ without stitching, or the layer map does not fit.
    """

    def __init__(
        self,
        teacher_model: nn.Module,
        student_model: nn.Module,
        tokenizer: Any,
        train_dataloader: Any,
        distill_loss_type: str = "mse",
        distill_loss_temperature: float = 1.0,
        use_stitching_layers: bool = True,
        stitching_layer_bias: bool = True,
        freeze_previous_blocks: bool = True,
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
            distill_loss_type=distill_loss_type,
            distill_loss_temperature=distill_loss_temperature,
            use_stitching_layers=use_stitching_layers,
            stitching_layer_bias=stitching_layer_bias,
            freeze_previous_blocks=freeze_previous_blocks,
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
        self.hidden_state_loss_fn: Loss = DistillationLoss(
            distill_loss_type, distill_loss_temperature
        )
        sizes = self.student.num_blocks, self.teacher.num_blocks
        self.layer_map = choose_layer_map(config.layer_map, *sizes)
        shards = sharded_blocks(teacher_model)
        if shards is not None:
            shards.keep_for(self.layer_map)
        self.learning_blocks = choose_blocks(config.blocks, self.student.num_blocks)
        self.stitches: StitchingLayers | None = None
        self.stitches_are_stale = False
        self.audit: TeacherAudit | None = None
        self.basis: Tensor | None = None
        self.is_prepared = False
        check_widths(self.teacher, self.student, stitched=config.use_stitching_layers)
        self.is_stitched = needs_stitches(self.teacher, self.student, config)
        check_inputs(config.block_inputs, config.schedule, self.activations)

    @property
    def shares_basis(self) -> bool:
        """Whether all stitches are the one basis in which the teacher's states enter the blocks."""
        return self.config.block_inputs != "student"

    @property
    def trains_stitches(self) -> bool:
        """Whether the stitches learn."""
        return self.config.train_stitches and not self.shares_basis

    def train_backbone(
        self,
        epochs_per_block: int | Sequence[int],
        lr_per_block: PerBlock,
        wd_per_block: PerBlock = 0.01,
        max_grad_norm_per_block: PerBlock = 1.0,
    ) -> dict[str, Any]:
        """Train all blocks in order.

        Args:
            epochs_per_block: Passes over the data per block; a number or one per block.
            lr_per_block: Peak learning rate; a number or one per block.
            wd_per_block: Weight decay of matrices; a number or one per block.
            max_grad_norm_per_block: Clipping threshold; a number or one per block.

        Returns:
            ``backbone_losses`` (last epoch's mean loss per block) and ``blocks``, one row per block
            with its first, best and last loss, relative error and verdict.

        Raises:
            UsageError: If a list has not one entry per block, or a value is out of range.
            NonFiniteError: If losses stay NaN or infinite.
        """
        settings = self.stage_settings(
            epochs_per_block, lr_per_block, wd_per_block, max_grad_norm_per_block
        )
        with self.running(len(settings), self.overwrite):
            rows = self._train_blocks(settings)
        return {"backbone_losses": [row["last_loss"] for row in rows], "blocks": rows}

    def stage_settings(
        self,
        epochs_per_block: int | Sequence[int],
        lr_per_block: PerBlock,
        wd_per_block: PerBlock,
        max_grad_norm_per_block: PerBlock,
    ) -> list[StageSettings]:
        """Check the data and the arguments of :meth:`train_backbone`, before a run starts."""
        self.steps_per_epoch()
        settings = block_settings(
            self.student.num_blocks,
            epochs_per_block=epochs_per_block,
            lr_per_block=lr_per_block,
            wd_per_block=wd_per_block,
            max_grad_norm_per_block=max_grad_norm_per_block,
        )
        return [
            own if block in self.learning_blocks else replace(own, epochs=0)
            for block, own in enumerate(settings)
        ]

    def about_run(self) -> dict[str, Any]:
        """What the manifest says of this run."""
        return {**super().about_run(), "layer_map": list(self.layer_map)}

    def prepare(self) -> None:
        """Measure the teacher, start the student from it, and make the stitches; done once."""
        if self.is_prepared:
            return
        config = self.config
        needs_statistics = standardises(self.hidden_state_loss_fn) or self.shares_basis
        if needs_statistics or config.init_from_teacher in BASES or config.audit_tokens:
            self._audit()
        self.basis = self.ranks.from_main(self._basis())
        if config.init_from_teacher != "none":
            models = self.teacher, self.student, self.layer_map
            for line in init_from_teacher(*models, config.init_from_teacher, self.basis):
                logger.info("From the teacher: %s", line)
        if self.is_stitched:
            self.stitches = self._new_stitches()
        self.is_prepared = True  # an interrupt before leaves it all to be done again

    def level_loss(self, block: int) -> Loss:
        """The hidden-state loss of a student block, knowing its teacher level's statistics."""
        loss_fn = self.hidden_state_loss_fn
        if self.audit is None or not standardises(loss_fn):
            return loss_fn
        statistics = self.audit.statistics(self.layer_map[block] + 1)
        loss_fn = loss_fn.at_level(statistics.to(self.device))
        are_raw = self.shares_basis or not self.is_stitched
        return loss_fn.on_raw_states() if are_raw else loss_fn

    def stages(self, activations: Activations) -> list[BlockStage]:
        """One stage per block that learns."""
        return [self._stage(block, activations) for block in sorted(self.learning_blocks)]

    @torch.no_grad()
    def last_read_out(self) -> StitchingLayer | None:
        """The last block's trained stitch, leading to the teacher's raw or token-normalised state.

        None without stitches, or if the loss leaves the state's length open.
        """
        if self.stitches is None:
            return None
        trained: Any = self.stitches[-1]
        loss_fn = self.level_loss(self.student.num_blocks - 1)
        if not standardises(loss_fn) or self.shares_basis:
            return trained
        back = loss_fn.restored()
        if back is None:
            return None
        matrix, mean = back
        stitch = StitchingLayer(self.student.hidden_size, self.teacher.hidden_size).to(self.device)
        weight, bias = trained.projection.weight, trained.projection.bias
        stitch.projection.weight.copy_(matrix @ weight)
        stitch.projection.bias.copy_(mean if bias is None else mean + matrix @ bias)
        return stitch

    def write_stitches(self) -> None:
        """Write the linear read-outs from the student as it is now to the teacher's raw states.

        Those that were trained are it, unless their targets were normalised or the student has
        changed since; then they are fitted by least squares.
        """
        if self.stitches is None:
            return
        stitches = self.stitches
        if self.stitches_are_stale:
            stitches = fit_read_outs(
                self.teacher, self.student, stitches, self.batches_to_measure(), READ_OUT_TOKENS
            )
        refuse_nonfinite(stitches.state_dict(), "the stitching layers were not written")
        self.run.write_bytes("stitching_layers.safetensors", stitches_to_bytes(stitches))

    def _basis(self) -> Tensor | None:
        """The basis in which the student sees the teacher's states; None at equal widths."""
        how, width = self.config.init_from_teacher, self.student.hidden_size
        is_needed = self.shares_basis or how in BASES
        if width == self.teacher.hidden_size or self.audit is None or not is_needed:
            return None
        return find_basis(how, self.audit.pooled_covariance(), width)

    def _audit(self) -> None:
        tokens = self.config.audit_tokens or DistillationConfig.audit_tokens
        self.teacher_model.eval()
        with self.precision.autocast(self.device):
            self.audit = audit_teacher(self.teacher, self.batches_to_measure(), tokens)
        width = self.student.hidden_size
        logger.info("The teacher's hidden states:\n%s", self.audit.shown(width))
        self.run.write_json("audit.json", {**self.audit.to_json(), "student_width": width})

    def _train_blocks(self, settings: list[StageSettings]) -> list[dict[str, Any]]:
        self.prepare()
        if not self.config.freeze_previous_blocks:
            logger.info("Earlier blocks and the embeddings go on learning with each block.")
        logger.info("Student block -> teacher block: %s", dict(enumerate(self.layer_map)))
        if self.shares_basis:
            logger.info("All stitches are one basis, in which the teacher's states enter blocks.")
        logger.info(ROW, *COLUMNS)
        ways = {"parallel_local": self._train_together, "decoupled": self._train_apart}
        rows = ways.get(self.config.schedule, self._train_in_turn)(settings)
        if any("chained_error" not in row for row in rows):
            self._chain(rows)
        fitted = len(self.learning_blocks) < len(rows)
        self.stitches_are_stale = not self.shares_basis and (
            fitted or standardises(self.hidden_state_loss_fn)
        )
        self.write_stitches()
        return rows

    def _chain(self, rows: list[dict[str, Any]]) -> None:
        """Say how far each block is off in the chain of all, if it did not learn in it."""
        known = self.journal.finished("chain")  # later stages change what would be measured
        if known is not None:
            found = known[0]["chained_errors"]
        else:
            stages = [self._stage(block, self.activations) for block in range(len(rows))]
            moved = self.config.schedule == "parallel_local"  # what enters blocks that rest
            for block in set(range(len(rows))) - set(self.learning_blocks) if moved else ():
                self._start_stitch(stages[block])
            with self.precision.autocast(self.device):
                found = self.ranks.from_main(chained_errors(stages, self.batches(0)))
            self.run.metrics.write("chain", chained_errors=found)
            self.journal.finish("chain", [{"chained_errors": found}])
        for row, error in zip(rows, found, strict=True):
            row.setdefault("chained_error", error)
        shown = ", ".join(f"{error:.4g}" for error in found)
        logger.info("Relative errors where all blocks follow each other: %s", shown)

    def _train_in_turn(self, settings: list[StageSettings]) -> list[dict[str, Any]]:
        return [self._train_block(block, own) for block, own in enumerate(settings)]

    def _train_apart(self, settings: list[StageSettings]) -> list[dict[str, Any]]:
        stages = [self._stage(block, self.activations) for block in range(len(settings))]
        results = DecoupledBlocks(self, stages, settings).run()
        return [self._write_row(*done) for done in zip(stages, results, strict=True)]

    def _train_block(self, block: int, settings: StageSettings) -> dict[str, Any]:
        stage = self._stage(block, self.activations)
        if not self.journal.began(stage.name):
            self._start_stitch(stage)
        return self._write_row(stage, self.train_stage(stage, settings))

    def _train_together(self, settings: list[StageSettings]) -> list[dict[str, Any]]:
        states = PassingStates(self.activations, self.layer_map)
        stages = [self._stage(block, states) for block in range(self.student.num_blocks)]
        name = "all blocks"
        if not self.journal.began(name):
            for stage in stages:
                self._start_stitch(stage)
        try:
            results = self.train_together(name, stages, settings)
        finally:
            states.forget()  # the head phase needs the room
        return [self._write_row(*done) for done in zip(stages, results, strict=True)]

    def _start_stitch(self, stage: BlockStage) -> None:
        if self.shares_basis:
            return
        # A block that does not learn is read out as well as it can be.
        if self.config.stitch_start == "least_squares" or stage.block not in self.learning_blocks:
            self.teacher_model.eval()
            self.student_model.eval()
            with self.precision.autocast(self.device):
                stage.fit_stitch(self.batches_to_measure(), STITCH_FIT_TOKENS)

    def _stage(self, block: int, activations: Activations) -> BlockStage:
        return BlockStage(
            block,
            self.layer_map[block],
            activations,
            self.level_loss(block),
            stitch=None if self.stitches is None else self.stitches[block],  # type: ignore[arg-type]
            freeze_previous=self.config.freeze_previous_blocks,
            first_position=self.config.first_hidden_position,
            train_stitch=self.trains_stitches,
            inputs=choose_inputs(self.config.block_inputs, activations, self.layer_map, self.basis),
        )

    def _write_row(self, stage: BlockStage, result: StageResult) -> dict[str, Any]:
        row = block_row(stage, result)
        moved = self.config.schedule == "parallel_local" and stage.block > min(self.learning_blocks)
        in_chain = self.config.freeze_previous_blocks and not (moved or self.shares_basis)
        if in_chain and result.steps:
            row["chained_error"] = row["relative_error"]
        self.run.metrics.write("block", **row)
        self.run.add_stage(row)
        logger.info(ROW, *shown_row(row))
        return row

    def after_epoch(self, stage: Stage, epoch: int) -> None:
        """Write the picture of this epoch, if pictures were asked for."""
        if self.config.hidden_state_pictures and isinstance(stage, BlockStage):
            batch = next(iter(self.batches(0, self.current_pass)))
            folder = self.run.path / "pictures" if self.ranks.is_main else None
            draw_block(stage, epoch, batch, folder)

    def _new_stitches(self) -> StitchingLayers:
        torch.manual_seed(derived_seed(self.config.seed, "stitches"))
        widths = self.student.hidden_size, self.teacher.hidden_size
        stitches = StitchingLayers(self.layer_map, *widths, self.config.stitching_layer_bias)
        if self.shares_basis and self.audit is not None:
            means = [self.audit.level_means[block + 1] for block in self.layer_map]
            share_basis(stitches, self.basis, means)
        return stitches.to(self.device).requires_grad_(self.trains_stitches)
