"""Distil a teacher into a student: the command, from its flags to the finished student.

``examples.run_distillation_example`` and ``cleangpt-distill`` are this. Torch and the rest are
imported inside the functions, so that ``--help`` is instant.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cleangpt.cli import setup_logging
from cleangpt.runtime.launcher import launched
from distillation.commands.data import build_dataloader, find_documents, validation_dataloader
from distillation.commands.layer_choice import settle_layer_map
from distillation.commands.scale import check_scale_flags, plan_for_cluster
from distillation.commands.settings import parse_arguments
from distillation.commands.student import build_student
from distillation.commands.student_flags import HF_STUDENT

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cleangpt.teacher import Teacher
    from distillation import DistillationTrainer
    from distillation.plan import RunPlan

logger = logging.getLogger(__name__)

StudentFinder = Callable[[str], Any]
"""Gives the class of a student by its kind's name."""


def registered(name: str) -> Any:
    """The class of that kind of student.

    Raises:
        ValueError: If the name is unknown.
    """
    from model import get_model_class

    return get_model_class(name)


def main(argv: list[str] | None = None, find_class: StudentFinder = registered) -> None:
    """Distil, say where the student is, and how to evaluate it.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
        find_class: Gives the student's class; your own gives a kind of your own.

    Raises:
        CleanGPTError: For anything the user can mend; ``run_command`` prints it in two lines.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    setup_logging(debug)
    arguments = parse_arguments(argv)
    if arguments.print_config:
        print(arguments.settings_text, end="")
        return
    check_scale_flags(arguments)
    if arguments.plan_device:
        planned, lines = plan_for_cluster(arguments, find_class)
        print("\n".join([planned.table(), *lines]))
        return
    if arguments.plan:
        trainer, _ = prepare(arguments, find_class)
        print(plan(trainer, arguments).table())
        return
    results, _ = distil(arguments, find_class)
    from cleangpt.runtime.ranks import leave

    leave()
    if launched(os.environ)[0] == 0:
        print(f"student: {results['student_path']}")
        print(f"evaluate it: {evaluation_command(arguments, results['student_path'])}")


def distil(
    arguments: argparse.Namespace, find_class: StudentFinder = registered
) -> tuple[dict[str, Any], "nn.Module"]:
    """Run what the flags describe, and tell at its end what it was planned to cost.

    Returns:
        The results of :meth:`DistillationTrainer.train`, and the student.
    """
    from cleangpt.metrics_log import format_seconds

    trainer, student = prepare(arguments, find_class)
    alone = launched(os.environ)[1] == 1
    was_done = (trainer.run.manifest() or {}).get("status") == "done" and arguments.resume
    planned = estimate(trainer, arguments) if alone and not was_done else None
    results = train(trainer, arguments)
    if planned:
        logger.info(
            "Planned %s, took %s (%+.0f %%).",
            format_seconds(planned),
            format_seconds(results["seconds"]),
            100 * (results["seconds"] / planned - 1),
        )
    return results, student


def estimate(trainer: "DistillationTrainer", arguments: argparse.Namespace) -> float | None:
    """The planned seconds; None for a student or teacher that cannot be measured on a small copy.

    A real run must not depend on its estimate: whatever stops the probe is only logged.
    """
    try:
        return plan(trainer, arguments).seconds
    except Exception as error:
        logger.info("No estimate of the run's time: %s: %s", type(error).__name__, error)
        return None


def prepare(
    arguments: argparse.Namespace, find_class: StudentFinder = registered
) -> "tuple[DistillationTrainer, nn.Module]":
    """Load what the flags name; for a plan, the teacher's and the student's shapes alone.

    Returns:
        The trainer, and the student.
    """
    # Names and places first: a wrong one is told before the seconds that importing torch takes.
    from cleangpt.run_directory import RunDirectory
    from cleangpt.teacher_source import check_teacher_name
    from cleangpt.trackers import check_trackers

    check_trackers(arguments.track)
    check_teacher_name(arguments.teacher_model_name_or_path, revision=arguments.teacher_revision)
    if not arguments.plan:
        RunDirectory(arguments.output_dir).check_room(arguments.overwrite, arguments.resume)
    source = find_documents(arguments)
    for note in source.notes:
        logger.warning("%s", note)

    import torch
    from transformers.utils import logging as transformers_logging

    from cleangpt.runtime.device import default_device, resolve_device
    from cleangpt.runtime.ranks import join
    from cleangpt.runtime.threads import set_threads

    transformers_logging.disable_progress_bar()
    device = resolve_device(arguments.device) if arguments.device else default_device()
    ranks = join(device)
    if ranks.count > 1 and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    threads = set_threads(arguments.threads, arguments.num_workers)
    several = f"; {ranks.count} processes share each batch" if ranks.count > 1 else ""
    logger.info("Seed %d on %s, %s%s", arguments.seed, device, threads, several)
    teacher = read_teacher(arguments, device, ranks.count)
    with torch.device("meta") if arguments.plan else contextlib.nullcontext():
        student = build_student(arguments, teacher, find_class)
    loader = build_dataloader(arguments, source, teacher, student, ranks)
    if not arguments.plan and settle_layer_map(arguments, teacher, student, loader, ranks, device):
        student = build_student(arguments, teacher, find_class)  # of the blocks that were found
    held_out = None
    if arguments.validation_tokens:
        held_out = validation_dataloader(arguments, teacher, loader, ranks)
    return build_trainer(arguments, teacher, student, loader, held_out, device), student


def read_teacher(
    arguments: argparse.Namespace, device: "torch.device", processes: int
) -> "Teacher":
    """The teacher the flags name, where they want its blocks; for a plan, its shape alone.

    Raises:
        UsageError: If the flags want the blocks at two places, or spread over one process.
    """
    import torch

    from cleangpt.device_maps import device_map
    from cleangpt.errors import UsageError
    from cleangpt.sharding import check_can_shard, shard_blocks
    from cleangpt.teacher import load_teacher, load_teacher_outline

    options: dict[str, Any] = {
        "revision": arguments.teacher_revision,
        "trust_remote_code": arguments.trust_remote_code,
    }
    name, places = arguments.teacher_model_name_or_path, arguments.teacher_device_map
    dtype = torch.bfloat16 if arguments.teacher_dtype == "bf16" else torch.float32
    if arguments.plan:
        outline = load_teacher_outline(name, dtype=dtype, **options)
        if places:
            outline.model.hf_device_map = device_map(outline.model, places, device)
        return outline
    if arguments.shard_teacher:
        check_can_shard(processes)
        if places:
            raise UsageError(
                "--shard_teacher spreads blocks over processes, --teacher_device_map over places.",
                "Leave one of them out.",
            )
        places = "disk"  # so that no process ever holds the whole teacher
    if places:
        options |= {"device": device, "places": places}
    teacher = load_teacher(name, dtype=dtype, **options)
    if arguments.shard_teacher:
        shard_blocks(teacher.model, device)
    return teacher


def plan(trainer: "DistillationTrainer", arguments: argparse.Namespace) -> "RunPlan":
    """What the flags' training will cost."""
    return trainer.plan(
        arguments.epochs_per_block,
        arguments.train_lm_head,
        arguments.lm_head_epochs,
        arguments.polish_epochs,
    )


def build_trainer(
    arguments: argparse.Namespace,
    teacher: "Teacher",
    student: "nn.Module",
    loader: Any,
    held_out: Any,
    device: Any,
) -> "DistillationTrainer":
    """Hand the flags that say how it trains to the trainer."""
    from distillation import DistillationTrainer
    from distillation.config import LoopOptions
    from distillation.layer_map import standing_in

    options = {name: getattr(arguments, name) for name in LoopOptions.__annotations__}
    trainer = DistillationTrainer(
        teacher.model,
        student,
        teacher.tokenizer,
        loader,
        device=device,
        output_dir=arguments.output_dir,
        log_interval=arguments.log_interval,
        distill_loss_type=arguments.distill_loss_type,
        distill_loss_temperature=arguments.distill_loss_temperature,
        use_stitching_layers=arguments.use_stitching_layers,
        stitching_layer_bias=arguments.stitching_layer_bias,
        freeze_previous_blocks=arguments.freeze_previous_blocks,
        logit_loss_type=arguments.logit_loss_type,
        logit_loss_temperature=arguments.logit_loss_temperature,
        logit_loss_weight=arguments.logit_loss_weight,
        validation_dataloader=held_out,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        keep_start=arguments.keep_start,
        **{**options, "layer_map": standing_in(arguments.layer_map)},
    )
    trainer.run.attachments["config.yaml"] = arguments.settings_text.encode()
    return trainer


def train(trainer: "DistillationTrainer", arguments: argparse.Namespace) -> dict[str, Any]:
    """Train as the flags say; the two names that differ are the contract's."""
    from cleangpt.data.batches import end_workers

    try:
        return trainer.train(
            epochs_per_block=arguments.epochs_per_block,
            lr_per_block=arguments.lr_per_block,
            wd_per_block=arguments.weight_decay_per_block,
            max_grad_norm_per_block=arguments.max_grad_norm_per_block,
            train_lm_head=arguments.train_lm_head,
            lm_head_epochs=arguments.lm_head_epochs,
            lm_head_lr=arguments.lm_head_lr,
            lm_head_wd=arguments.lm_head_weight_decay,
            lm_head_max_grad_norm=arguments.lm_head_max_grad_norm,
            initialize_head_from_teacher=arguments.initialize_head_from_teacher,
            polish_epochs=arguments.polish_epochs,
            polish_lr=arguments.polish_lr,
            polish_wd=arguments.polish_weight_decay,
            polish_max_grad_norm=arguments.polish_max_grad_norm,
        )
    finally:
        end_workers(trainer.backbone_trainer.train_dataloader)


def evaluation_command(arguments: argparse.Namespace, student_path: str) -> str:
    """The command that evaluates this run's student against its teacher on held-out text."""
    import shlex

    from distillation.evaluation.flags import EVALUATE, evaluation_flags

    words = [*EVALUATE, "--model_path", student_path]
    if not arguments.start_student and arguments.student_model_type != HF_STUDENT:
        words += ["--model_type", arguments.student_model_type]
    words += evaluation_flags(vars(arguments))
    return shlex.join([*words, "--generate_comparisons"])
