"""A trainer's models, data and settings, turned into the plan of its run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from cleangpt.blocks import BlockStack
from cleangpt.device_maps import bytes_on
from cleangpt.errors import OutOfMemory, UsageError, ran_out_of_memory
from cleangpt.runtime.memory import free_memory
from distillation.activations import kept_widths
from distillation.cache_plan import (
    cache_setting,
    free_disk,
    needed_bytes,
    plan_cache,
    positions_in,
)
from distillation.memory_advice import memory_advice
from distillation.passes import passes_of
from distillation.plan import RunPlan, plan_run
from distillation.probe import measure_costs, shrunk
from distillation.trainers.backbone_trainer import BackboneDistillationTrainer
from distillation.workload import Workload


def plan_training(
    trainer: BackboneDistillationTrainer,
    epochs_per_block: Sequence[int],
    head_epochs: int | None,
    polish_epochs: int,
) -> RunPlan:
    """Plan the run of a trainer; see :meth:`DistillationTrainer.plan`."""
    config, teacher, student = trainer.config, trainer.teacher, trainer.student
    positions = positions_in(trainer.train_dataloader)
    if positions is None:
        raise UsageError(
            "The train_dataloader does not tell how many tokens it holds, so there is no plan.",
            "Give it a dataset with num_tokens, such as TextDataset, or with block_size.",
        )
    widths = small_widths(trainer.teacher_model, trainer.student_model, config.block_inputs)
    epochs = (epochs_per_block, head_epochs, polish_epochs)
    work = _workload(trainer, positions, epochs)
    kept = round(positions * (1 + work.held_out))
    need = needed_bytes(kept, widths, config.activation_dtype)
    limit = config.activation_cache_gb
    unloaded = sum(p.nbytes for p in trainer.student_model.parameters() if p.is_meta)
    if all(parameter.is_meta for parameter in trainer.teacher_model.parameters()):
        unloaded += bytes_on(trainer.device, trainer.teacher_model)
    cache = plan_cache(
        cache_setting(config.activation_cache, config.keep_activations),
        need,
        max(0, free_memory(trainer.device) - unloaded),
        free_disk(trainer.run.path),
        None if limit is None else int(limit * 1e9),
    )
    levels = work.levels_at_once(teacher.num_blocks)
    all_levels = needed_bytes(kept, [widths[0]] * levels, config.activation_dtype)
    if cache.kind == "ram" and all_levels <= cache.budget_bytes:
        work = replace(work, levels_fit=True)
        need = max(need, all_levels)
    costs = measure_costs(
        trainer.teacher_model,
        trainer.student_model,
        batch_size=work.batch_size,
        seq_len=work.seq_len,
        config=config,
        precision=trainer.precision,
        device=trainer.device,
    )
    return plan_run(teacher, student, work, costs, cache, need)


def small_widths(
    teacher_model: nn.Module, student_model: nn.Module, block_inputs: str
) -> list[int]:
    """The widths of the states that are kept, of models with or without weights."""
    small = [BlockStack(shrunk(model, 1)) for model in (teacher_model, student_model)]
    return kept_widths(small[0], small[1], block_inputs)


@contextmanager
def memory_explained(
    trainer: BackboneDistillationTrainer,
    head: dict[str, Any] | None,
    polish: dict[str, Any] | None,
) -> Iterator[None]:
    """Turn the many errors about memory into one that says what to lower, and by how much.

    Args:
        trainer: Its models and data are what memory is for.
        head: The arguments of the head phase; None if it does not run.
        polish: Those of the polish, likewise.

    Raises:
        OutOfMemory: If memory ran out inside the block. Nothing is saved then: the last checkpoint
            stays the newest.
    """
    try:
        yield
    except Exception as error:
        positions = positions_in(trainer.train_dataloader)
        if not ran_out_of_memory(error) or isinstance(error, OutOfMemory) or positions is None:
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        epochs = (
            [1] * trainer.student.num_blocks,
            None if head is None else 1,
            int(polish is not None),
        )
        work = _workload(trainer, positions, epochs)
        kept = trainer.activations.expected["ram"]
        raise memory_advice(said, trainer.teacher, trainer.student, work, kept) from error


def _workload(
    trainer: BackboneDistillationTrainer,
    positions: int,
    epochs: tuple[Sequence[int], int | None, int],
) -> Workload:
    """The data as the loader describes it, nothing is read from it; epochs of the three phases."""
    loader = trainer.train_dataloader
    owners = (getattr(loader, "dataset", None), getattr(loader, "collate_fn", None))
    sizes = [int(getattr(owner, "block_size", 0) or 0) for owner in owners]
    num_batches = max(1, len(loader))
    seq_len = max(1, min(positions, max(sizes) or positions // num_batches))
    batch_size = getattr(loader, "batch_size", None) or max(1, positions // (num_batches * seq_len))
    share = positions / (batch_size * seq_len)
    return Workload(
        positions=positions,
        # Documents that are not packed fill more batches than their tokens would.
        batches=share if num_batches - 1 < share <= num_batches else float(num_batches),
        batch_size=batch_size,
        seq_len=seq_len,
        epochs_per_block=epochs[0],
        head_epochs=epochs[1],
        polish_epochs=epochs[2],
        layer_map=trainer.layer_map,
        schedule=trainer.config.schedule,
        freeze_previous=trainer.config.freeze_previous_blocks,
        reads_teacher=trainer.shares_basis,
        reads_student=trainer.config.block_inputs != "teacher",
        passes=passes_of(loader),
        polish_reads_levels=trainer.config.polish_hidden_weight > 0,
        trains_stitches=trainer.trains_stitches and trainer.is_stitched,
        teacher_bytes=bytes_on(trainer.device, trainer.teacher_model),
        held_out=(positions_in(trainer.validation_dataloader) or 0) / max(1, positions),
    )
