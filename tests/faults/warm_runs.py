"""A tiny run of every stage, for processes that ``kill_harness.start_warm`` forks."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from cleangpt.cli import run_command, setup_logging
from cleangpt.data.batches import make_dataloader
from distillation import DistillationTrainer
from tests.builders import batches, tiny_student, tiny_teacher

# Blocks of 2 x 4 steps, then 4 of the head and 8 of the polish.
TRAINING: dict[str, Any] = {
    "epochs_per_block": 2,
    "lr_per_block": 1e-2,
    "lm_head_epochs": 1,
    "polish_epochs": 2,
}
STEPS_PER_EPOCH = 4
STEPS = STEPS_PER_EPOCH * (2 * 2 + 1 + 2)
METHOD: dict[str, Any] = {
    "distill_loss_type": "nmse",
    "init_from_teacher": "pca",
    "stitch_start": "least_squares",
    "polish_hidden_weight": 3.0,
    "audit_tokens": 64,
    "activation_cache": "disk",
    "checkpoint_steps": 3,
    "log_interval": 1,
}


def train(
    folder: Path, num_workers: int = 0, training: dict[str, Any] | None = None, **options: Any
) -> None:
    """Go on with the run in a folder, or begin one, and exit as a command does.

    Args:
        folder: The run's.
        num_workers: Processes of the loader.
        training: In place of what ``TRAINING`` says.
        **options: In place of what ``METHOD`` says.
    """
    setup_logging()

    def main(_: list[str] | None) -> None:
        windows = [{k: v[0] for k, v in batch.items()} for batch in batches(16, batch_size=1)]
        assert len(windows) == 4 * STEPS_PER_EPOCH
        DistillationTrainer(
            tiny_teacher(),
            tiny_student(dropout=0.1),
            None,
            make_dataloader(windows, default_collate, 4, seed=1, num_workers=num_workers),  # type: ignore[arg-type]
            output_dir=folder,
            precision="fp32",
            validation_dataloader=batches(1),
            **{"resume": True, **METHOD, **options},
        ).train(**{**TRAINING, **(training or {})})

    sys.exit(run_command(main, []))


torch.set_num_threads(1)
# What transformers imports once a model is built, before the fork and not after each.
tiny_teacher()
tiny_student()
