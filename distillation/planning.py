"""A trainer's models, data and settings, turned into the plan of its run."""

from collections.abc import Sequence

from cleangpt.blocks import BlockStack
from cleangpt.errors import UsageError
from distillation.activations import state_width
from distillation.cache_plan import free_disk, free_memory, needed_bytes, plan_cache, positions_in
from distillation.plan import RunPlan, Workload, plan_run
from distillation.probe import measure_costs, shrunk
from distillation.trainers.backbone_trainer import BackboneDistillationTrainer


def plan_training(
    trainer: BackboneDistillationTrainer, epochs_per_block: Sequence[int], head_epochs: int | None
) -> RunPlan:
    """Plan the run of a trainer; see :meth:`DistillationTrainer.plan`."""
    config, teacher, student = trainer.config, trainer.teacher, trainer.student
    positions = positions_in(trainer.train_dataloader)
    if positions is None:
        raise UsageError(
            "The train_dataloader does not tell how many tokens it holds, so there is no plan.",
            "Give it a dataset with num_tokens, such as TextDataset, or with block_size.",
        )
    batches = max(1, len(trainer.train_dataloader))
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    seq_len = min(positions, int(getattr(dataset, "block_size", 0)) or positions // batches)
    batch_size = getattr(trainer.train_dataloader, "batch_size", None)
    work = Workload(
        positions,
        batch_size or max(1, positions // (batches * seq_len)),
        seq_len,
        epochs_per_block,
        head_epochs,
        trainer.layer_map,
        config.schedule,
    )
    widths = [
        state_width(BlockStack(shrunk(model, 1)))
        for model in (trainer.teacher_model, trainer.student_model)
    ]
    need = needed_bytes(positions, widths[0], widths[1], config.activation_dtype)
    limit = config.activation_cache_gb
    unloaded = sum(
        parameter.nbytes
        for model in (trainer.teacher_model, trainer.student_model)
        for parameter in model.parameters()
        if parameter.is_meta
    )
    cache = plan_cache(
        config.activation_cache,
        need,
        max(0, free_memory(trainer.device) - unloaded),
        free_disk(trainer.run.path),
        None if limit is None else int(limit * 1e9),
    )
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
