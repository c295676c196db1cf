"""Teachers too large for one device, and plans for many: their flags, and the plan's command."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from cleangpt.cli import CommandParser, positive_float, positive_int, probability
from cleangpt.errors import InputError, UsageError

if TYPE_CHECKING:
    from distillation.scale_plan import ScalePlan
    from distillation.scale_sizes import Setup
    from distillation.workload import Workload

PLAN_DEVICES = ("a100", "h100", "h200", "b200")
_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TEACHER_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Grattafiori et al. 2024 (arXiv:2407.21783), table 3, and the published configurations."""


def add_scale_flags(parser: CommandParser) -> None:
    """Add them to the command's parser."""
    add = parser.add_argument
    add(
        "--teacher_device_map",
        metavar="PLACES",
        help="where the teacher's blocks lie if not all on the device: auto, or places with numbers"
        " of blocks as cuda=20,cpu=8,disk (default: all on the device)",
    )
    add(
        "--shard_teacher",
        action="store_true",
        help="spread the teacher's blocks over the processes of the run, with FSDP2 (default: off)",
    )
    add(
        "--teacher_dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="what the teacher's weights are kept in (default: fp32)",
    )
    add(
        "--plan_device",
        choices=PLAN_DEVICES,
        help="with --plan: plan for such devices by their makers' figures, not for this machine"
        " (default: this machine)",
    )
    add("--plan_devices", type=positive_int, help="with --plan_device: how many (default: 8)")
    add(
        "--plan_efficiency",
        type=probability,
        help="with --plan_device: share of the peak that is reached (default: 0.4)",
    )
    add(
        "--plan_tokens",
        type=positive_float,
        help="with --plan_device: tokens of the data, as 1e9 (default: those of --dataset_name)",
    )
    add(
        "--teacher_config",
        metavar="SHAPE",
        help="with --plan_device: plan for a teacher of this shape, of which nothing else is"
        f" needed: {', '.join(TEACHER_SHAPES)}, a JSON file, or a folder with a config.json"
        " (default: the teacher's own)",
    )


def check_scale_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags of a plan where none is asked for, and a shape without data.

    Raises:
        UsageError: If flags need others that are missing.
    """
    names = ("plan_devices", "plan_efficiency", "plan_tokens", "teacher_config")
    given = [f"--{name}" for name in names if getattr(arguments, name) is not None]
    if arguments.plan_device and not arguments.plan:
        raise UsageError("--plan_device does nothing without --plan.", "Add --plan.")
    if given and not arguments.plan_device:
        raise UsageError(
            f"{', '.join(given)} {'does' if len(given) == 1 else 'do'} nothing without"
            " --plan_device.",
            f"Add --plan --plan_device {PLAN_DEVICES[1]}.",
        )
    if arguments.plan_device and arguments.streaming:
        raise UsageError(
            "--plan_device plans for data that are kept, and --streaming keeps none.",
            "Leave out --streaming, and say with --plan_tokens how large a pass is.",
        )
    if arguments.plan_device and arguments.schedule == "decoupled":
        raise UsageError(
            "--plan_device plans for rows shared between devices, and --schedule decoupled shares"
            " blocks.",
            "Plan --schedule sequential; decoupled blocks take its time divided by the devices, at"
            " most by the student's blocks, and exchange no gradients.",
        )
    if arguments.teacher_config and arguments.plan_tokens is None:
        raise UsageError(
            "--teacher_config has no tokenizer to count the data's tokens with.",
            "Say how many there are, such as --plan_tokens 1e9.",
        )


def plan_for_cluster(
    arguments: argparse.Namespace, get_model_class: Any
) -> "tuple[ScalePlan, list[str]]":
    """The plan that the flags describe, and what to do about it.

    Loads no weights, and no data unless it has to count it.
    """
    import torch

    from cleangpt.blocks import BlockStack
    from distillation.accelerators import ACCELERATORS, Cluster
    from distillation.commands.student import build_student
    from distillation.scale_advice import advice
    from distillation.scale_plan import plan_at_scale

    teacher = outline(arguments)
    with torch.device("meta"):
        student = BlockStack(build_student(arguments, teacher, get_model_class))
    stack = BlockStack(teacher.model)
    cluster = Cluster(ACCELERATORS[arguments.plan_device], arguments.plan_devices or 8)
    if arguments.plan_efficiency:
        cluster = Cluster(cluster.kind, cluster.count, arguments.plan_efficiency)
    work = workload(arguments, stack, student, tokens(arguments, teacher, student.model))
    own = setup(arguments, stack, student)
    plan = plan_at_scale(stack, student, work, cluster, own)
    return plan, advice(plan, arguments.batch_size, own)


def outline(arguments: argparse.Namespace) -> Any:
    """The teacher without weights: its model, and special tokens at least."""
    from cleangpt.teacher import load_teacher_outline

    if arguments.teacher_config:
        model = model_of_shape(arguments.teacher_config)
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        ids = {name: getattr(model.config, name, None) for name in names}
        last = {"the last token": model.config.get_text_config().vocab_size - 1}
        tokenizer = SimpleNamespace(**ids, get_vocab=lambda: last)
        return SimpleNamespace(model=model, tokenizer=tokenizer)
    return load_teacher_outline(
        arguments.teacher_model_name_or_path,
        revision=arguments.teacher_revision,
        trust_remote_code=arguments.trust_remote_code,
    )


def model_of_shape(name: str) -> Any:
    """A causal LM without weights, from a configuration.

    Raises:
        InputError: If there is none of that name, or it is not one of a causal LM.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(name)
    try:
        if name in TEACHER_SHAPES:
            fields = TEACHER_SHAPES[name]
        else:
            file = path / "config.json" if path.is_dir() else path
            fields = json.loads(file.read_text(encoding="utf-8"))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    except Exception as error:  # every family checks its fields with errors of its own
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"--teacher_config {name} is not the configuration of a causal language model: {cause}",
            f"Give one of {', '.join(TEACHER_SHAPES)}, a JSON file or a folder with a config.json.",
        ) from error


def tokens(arguments: argparse.Namespace, teacher: Any, student: Any) -> int:
    """Tokens of one pass over the data: as said, or as counted."""
    if arguments.plan_tokens is not None:
        return int(arguments.plan_tokens)
    from distillation.cache_plan import positions_in
    from distillation.commands.data import build_dataloader, find_documents

    loader = build_dataloader(arguments, find_documents(arguments), teacher, student)
    return positions_in(loader) or 0


def workload(
    arguments: argparse.Namespace, teacher: Any, student: Any, positions: int
) -> "Workload":
    """What is trained on, and how often."""
    from distillation.config import spread
    from distillation.layer_map import choose_layer_map, standing_in
    from distillation.preflight import needs_stitches
    from distillation.workload import Workload

    blocks = student.num_blocks
    epochs = spread("epochs_per_block", arguments.epochs_per_block, blocks)
    return Workload(
        positions=positions,
        batches=positions / (arguments.batch_size * arguments.block_size),
        batch_size=arguments.batch_size,
        seq_len=arguments.block_size,
        epochs_per_block=[
            int(str(own)) if arguments.blocks is None or block in arguments.blocks else 0
            for block, own in enumerate(epochs)
        ],
        head_epochs=arguments.lm_head_epochs if arguments.train_lm_head else None,
        polish_epochs=arguments.polish_epochs,
        layer_map=choose_layer_map(standing_in(arguments.layer_map), blocks, teacher.num_blocks),
        schedule=arguments.schedule,
        freeze_previous=arguments.freeze_previous_blocks,
        reads_teacher=arguments.block_inputs != "student",
        reads_student=arguments.block_inputs != "teacher",
        polish_reads_levels=arguments.polish_hidden_weight > 0,
        trains_stitches=arguments.train_stitches
        and arguments.block_inputs == "student"
        and needs_stitches(teacher, student, arguments),
    )


def setup(arguments: argparse.Namespace, teacher: Any, student: Any) -> "Setup":
    """How the run is laid out."""
    from distillation.activations import state_width
    from distillation.config import DistillationConfig
    from distillation.losses import DistillationLoss
    from distillation.scale_sizes import Setup

    widths = [teacher.hidden_size, state_width(student)]
    limit = arguments.activation_cache_gb
    standardises = DistillationLoss(arguments.distill_loss_type).needs_statistics
    shares_basis = arguments.block_inputs != "student"
    audits = (
        standardises
        or shares_basis
        or arguments.audit_tokens > 0
        or arguments.init_from_teacher in ("pca", "slice")
    )
    return Setup(
        kept_widths=[*widths, widths[0]] if shares_basis else widths,
        shards_teacher=arguments.shard_teacher,
        teacher_itemsize=2 if arguments.teacher_dtype == "bf16" else 4,
        cache=arguments.activation_cache,
        cache_bytes=None if limit is None else int(limit * 1e9),
        state_dtype=arguments.activation_dtype,
        audit_tokens=(arguments.audit_tokens or DistillationConfig.audit_tokens) if audits else 0,
        read_out_fits=(standardises and not shares_basis) + (arguments.polish_epochs > 0),
    )
