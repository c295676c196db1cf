"""What a finished run leaves: the student as one file and as a HuggingFace folder."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cleangpt.blocks import BlockStack
from cleangpt.checkpoints import Checkpoints, refuse_nonfinite
from cleangpt.errors import CheckpointError, UsageError
from cleangpt.manifest import check_listed, check_same_run
from cleangpt.run_directory import RunDirectory
from cleangpt.runtime.faultpoints import faultpoint
from distillation.displays import TrainingResults
from distillation.head_init import untie_lm_head
from distillation.journal import check_same_settings
from distillation.model_card import saved_student, write_card
from distillation.utils.checkpoint import load_checkpoint, load_strictly, save_checkpoint

logger = logging.getLogger(__name__)

FINAL_NAME = "student_model_final_distilled.pt"


def save_student(
    run: RunDirectory,
    student: nn.Module,
    fill: Callable[[Path], object],
    layer_map: Sequence[int],
    results: dict[str, Any],
) -> None:
    """Write the student, and read the file back.

    Args:
        run: Where.
        student: The model.
        fill: Writes it into a folder as transformers reads it.
        layer_map: The teacher block of each student block.
        results: What the stages returned.

    Raises:
        CheckpointError: If a weight is not finite, or the file does not hold what was written.
    """
    if not run.writes:
        return
    run.note(saved_student=saved_student(student))
    path = save_checkpoint(
        student,
        run.path / FINAL_NAME,
        run_id=run.run_id,
        layer_map=list(layer_map),
        backbone_losses=results["backbone_losses"],
        head_loss=results["head_loss"],
        polish_loss=results["polish_loss"],
    )
    faultpoint("student.file_written")
    # Second: whatever a tokenizer or model of others does on saving, the weights are safe by then.
    run.write_folder("final", fill)
    faultpoint("student.folder_written")
    stored = load_checkpoint(path)["model_state_dict"]
    state = student.state_dict()
    if any(not torch.equal(stored[name], tensor.cpu()) for name, tensor in state.items()):
        raise CheckpointError(
            f"{path} does not hold what was just written to it.",
            "The disk may be failing; choose an output_dir on another one.",
        )
    logger.info("The student is in %s and, for transformers, in %s.", path, path.parent / "final")
    logger.info("Its report: python -m distillation.report %s", path.parent)


def finish(run: RunDirectory, results: dict[str, Any], seconds: float) -> TrainingResults:
    """Add to what the stages returned where it is and what it sums to; write the student's card."""
    path = run.path
    rows = [*results["blocks"], *(results[k] for k in ("head", "polish") if results[k])]
    results["output_dir"] = str(path)
    results["student_path"] = str(path / FINAL_NAME)
    results["skipped_batches"] = sum(row["skipped"] for row in rows)
    results["seconds"] = seconds
    run.note(results=results)
    if run.writes:
        write_card(path, run.record)
    return TrainingResults(results)


def fill_folder(student: Any, tokenizer: Any, folder: Path) -> None:
    """Write student and tokenizer as transformers reads them, unless a weight is not finite."""
    refuse_nonfinite(student.state_dict(), f"{folder} was not written")
    student.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def finished_results(
    run: RunDirectory, about: dict[str, Any], settings: dict[str, Any], student: BlockStack
) -> TrainingResults | None:
    """What a run that is done returned, and its weights for the student; None if it is not.

    Raises:
        CheckpointError: If it was another run, or its file is damaged.
    """
    manifest = run.manifest()
    if manifest is None or manifest.get("status") != "done":
        return None
    if "results" not in manifest:
        raise UsageError(
            f"{run.path} holds a finished run that says nothing of its results: it was made by an"
            " earlier version, or by the trainer of one stage.",
            "Choose another output_dir, or pass --overwrite to replace it.",
        )
    check_same_run(manifest, about, run.path)
    check_listed(run.path, "config.json")
    check_same_settings(run.path / "config.json", settings)
    path = run.path / FINAL_NAME
    check_listed(run.path, FINAL_NAME)
    saved = load_checkpoint(path)
    if not saved["config"].get("tie_word_embeddings", True):
        untie_lm_head(student)
    load_strictly(student.model, saved["model_state_dict"], path)
    Checkpoints(run.path / "checkpoints", str(manifest["run_id"]), writes=run.writes).remove()
    logger.info("The run in %s is done; nothing is left to do.", run.path)
    return TrainingResults(manifest["results"])
