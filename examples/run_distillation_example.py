"""Distil a teacher into a student from the command line.

    python -m examples.run_distillation_example

alone distils the built-in teacher on the built-in text. ``--help`` lists everything; it is instant,
since torch and the rest are imported inside the functions.
"""

import argparse
import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from cleangpt.cli import (
    CommandParser,
    add_switch,
    non_negative_float,
    non_negative_int,
    number_or_list,
    positive_float,
    positive_int,
    probability,
    run_command,
    setup_logging,
)

if TYPE_CHECKING:
    from torch import nn

    from cleangpt.data import DistillationDataCollator, TextDataset
    from cleangpt.teacher import Teacher
    from model import get_model_class

PROGRAM = "examples.run_distillation_example"
logger = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    """Give notebooks what this command is built from, without loading it for ``--help``."""
    homes = {
        "TextDataset": "cleangpt.data",
        "DistillationDataCollator": "cleangpt.data",
        "get_model_class": "model",
    }
    if name in homes:
        return getattr(importlib.import_module(homes[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["DistillationDataCollator", "TextDataset", "get_model_class", "main"]


def main(argv: list[str] | None = None) -> None:
    """Distil, say where the student is, and how to evaluate it.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Raises:
        CleanGPTError: For anything the user can mend; ``run_command`` prints it in two lines.
    """
    arguments = build_parser().parse_args(argv)
    setup_logging(arguments.debug)
    results, _ = distil(arguments)
    print(f"student: {results['student_path']}")
    print(f"evaluate it: {evaluation_command(arguments, results['student_path'])}")


def distil(arguments: argparse.Namespace) -> tuple[dict[str, Any], "nn.Module"]:
    """Run what the flags describe.

    Returns:
        The results of :meth:`DistillationTrainer.train`, and the student.
    """
    from transformers.utils import logging as transformers_logging

    from cleangpt.data import (
        DistillationDataCollator,
        TextDataset,
        load_texts,
        make_dataloader,
    )
    from cleangpt.runtime.device import default_device, resolve_device
    from cleangpt.teacher import load_teacher

    transformers_logging.disable_progress_bar()
    device = resolve_device(arguments.device) if arguments.device else default_device()
    source = load_texts(
        arguments.dataset_name,
        config_name=arguments.dataset_config_name,
        split=arguments.dataset_split,
        text_column=arguments.dataset_text_column,
        max_samples=arguments.max_samples,
    )
    for note in source.notes:
        logger.warning("%s", note)
    teacher = load_teacher(
        arguments.teacher_model_name_or_path,
        revision=arguments.teacher_revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    student = build_student(arguments, teacher)
    dataset = TextDataset(source.texts, teacher.tokenizer, arguments.block_size)
    logger.info(
        "%d documents of %s: %s tokens in %d windows of %d",
        len(source.texts),
        source.name,
        f"{dataset.num_tokens:,}",
        len(dataset),
        arguments.block_size,
    )
    loader = make_dataloader(
        dataset,
        DistillationDataCollator(teacher.tokenizer, arguments.block_size),
        arguments.batch_size,
        seed=arguments.seed,
        num_workers=arguments.num_workers,
    )
    return _train(arguments, teacher, student, loader, device), student


def build_student(arguments: argparse.Namespace, teacher: "Teacher") -> "nn.Module":
    """Build the student the flags describe, for this teacher.

    Raises:
        UsageError: If the flags do not describe a student.
    """
    import torch

    from cleangpt.blocks import BlockStack
    from cleangpt.errors import UsageError
    from config_distillation import GPTConfig
    from model import get_model_class

    stack = BlockStack(teacher.model)
    teacher_heads = int(teacher.model.config.get_text_config().num_attention_heads)
    n_head = arguments.student_n_head or teacher_heads
    # Half of the teacher's width, rounded to whole heads of an even size.
    n_embd = (
        arguments.student_n_embd or max(1, round(stack.hidden_size / (4 * n_head))) * 2 * n_head
    )
    context = stack.context_length or arguments.block_size
    if arguments.block_size > context:
        raise UsageError(
            f"--block_size {arguments.block_size} exceeds the teacher's context of {context}.",
            f"Pass --block_size {context} or less.",
        )
    try:
        config = GPTConfig(
            block_size=arguments.block_size,
            vocab_size=stack.vocab_size,
            n_layer=arguments.student_n_layer or stack.num_blocks,
            n_head=n_head,
            n_embd=n_embd,
            dropout=arguments.student_dropout,
            bias=arguments.student_bias,
            padding_idx=teacher.tokenizer.pad_token_id,
            model_type=arguments.student_model_type,
            use_proj=arguments.student_use_proj,
            use_v=arguments.student_use_v,
            use_channel_factor_v=arguments.student_use_channel_factor_v,
            use_channel_factor_proj=arguments.student_use_channel_factor_proj,
            output_hidden_states=True,
            teacher_n_embd=stack.hidden_size,
        )
    except ValueError as error:
        cause = str(error).splitlines()[0]
        raise UsageError(cause, "Change the --student_... flags named above.") from error
    torch.manual_seed(arguments.seed)
    student: nn.Module = get_model_class(arguments.student_model_type)(config=config)
    for name in ("bos_token_id", "eos_token_id"):
        setattr(student.config, name, getattr(teacher.tokenizer, name))
        setattr(student.generation_config, name, getattr(teacher.tokenizer, name))
    logger.info(
        "Student: %s, %d blocks of width %d, %s parameters;"
        " teacher: %d blocks of width %d, %s parameters",
        arguments.student_model_type,
        config.n_layer,
        config.n_embd,
        f"{sum(p.numel() for p in student.parameters()):,}",
        stack.num_blocks,
        stack.hidden_size,
        f"{sum(p.numel() for p in teacher.model.parameters()):,}",
    )
    return student


def _train(
    arguments: argparse.Namespace,
    teacher: "Teacher",
    student: "nn.Module",
    loader: Any,
    device: Any,
) -> dict[str, Any]:
    """Hand the flags to the trainer; the two names that differ are the contract's."""
    from distillation import DistillationTrainer

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
        overwrite=arguments.overwrite,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        lr_schedule=arguments.lr_schedule,
        warmup_ratio=arguments.warmup_ratio,
        min_lr_ratio=arguments.min_lr_ratio,
        max_nonfinite_in_a_row=arguments.max_nonfinite_in_a_row,
        hidden_state_pictures=arguments.hidden_state_pictures,
        seed=arguments.seed,
    )
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
    )


def evaluation_command(arguments: argparse.Namespace, student_path: str) -> str:
    """The command that evaluates this run's student against its teacher on held-out text."""
    import shlex

    words = ["python", "-m", "distillation.evaluation.evaluate_distilled_model"]
    words += ["--model_path", student_path, "--model_type", arguments.student_model_type]
    words += ["--teacher_model_name", arguments.teacher_model_name_or_path]
    words += ["--dataset_name", arguments.dataset_name]
    if arguments.dataset_config_name:
        words += ["--dataset_config_name", arguments.dataset_config_name]
    if arguments.dataset_text_column:
        words += ["--dataset_text_column", arguments.dataset_text_column]
    return shlex.join([*words, "--generate_comparisons"])


def build_parser() -> CommandParser:
    """All flags of the command."""
    parser = CommandParser(
        prog=f"python -m {PROGRAM}",
        description="Distil a HuggingFace causal language model into a smaller one by blocks.",
    )
    _add_model_flags(parser)
    _add_data_flags(parser)
    _add_backbone_flags(parser)
    _add_head_flags(parser)
    _add_run_flags(parser)
    return parser


def _add_model_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add(
        "--teacher_model_name_or_path",
        default="builtin",
        help="builtin, smollm2, a folder, a .gguf file or a hub name (default: builtin)",
    )
    add("--teacher_revision", help="revision of a teacher from the hub")
    add(
        "--trust_remote_code",
        action="store_true",
        help="let code inside the teacher's folder run; off by default",
    )
    add("--student_model_type", choices=("Factored", "SASP", "Vanilla"), default="Vanilla")
    add("--student_n_layer", type=positive_int, help="blocks (default: as many as the teacher)")
    add("--student_n_embd", type=positive_int, help="width (default: half of the teacher's)")
    add("--student_n_head", type=positive_int, help="heads (default: the teacher's)")
    add("--student_dropout", type=probability, default=0.0, help="in [0, 1) (default: 0)")
    for name, text in (
        ("bias", "biases in the blocks' linear maps and norms"),
        ("use_proj", "an output projection in Factored and SASP blocks"),
        ("use_v", "a value matrix in Factored and SASP blocks"),
        ("use_channel_factor_v", "a Kronecker value map"),
        ("use_channel_factor_proj", "a Kronecker output projection"),
    ):
        add(f"--student_{name}", action="store_true", help=text)


def _add_data_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add(
        "--dataset_name",
        default="builtin",
        help="builtin, a .txt .jsonl .parquet .csv file, a folder of them, or a data set's name"
        " (default: builtin)",
    )
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split", default="train", help="split to train on (default: train)")
    add("--dataset_text_column", help="column with the text (default: found)")
    add(
        "--max_samples",
        type=non_negative_int,
        default=0,
        help="use the first so many documents (default: 0, all)",
    )
    add("--block_size", type=positive_int, default=128, help="tokens per window (default: 128)")
    add("--batch_size", type=positive_int, default=16, help="windows per batch (default: 16)")
    add("--num_workers", type=non_negative_int, default=0, help="loader processes (default: 0)")


def _add_backbone_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    per_block = "one value, or one per block as 1e-3,5e-4,..."
    add(
        "--epochs_per_block",
        type=number_or_list(non_negative_int),
        default=1,
        help=f"passes over the data per block: {per_block} (default: 1)",
    )
    add(
        "--lr_per_block",
        type=number_or_list(positive_float),
        default=1e-3,
        help=f"peak learning rate: {per_block} (default: 1e-3)",
    )
    add("--weight_decay_per_block", type=number_or_list(non_negative_float), default=0.01)
    add("--max_grad_norm_per_block", type=number_or_list(positive_float), default=1.0)
    add("--distill_loss_type", choices=("mse", "kl_div"), default="mse")
    add("--distill_loss_temperature", type=positive_float, default=1.0)
    add_switch(
        parser,
        "freeze_previous_blocks",
        "no_freeze_previous_blocks",
        True,
        "keep earlier blocks fixed",
    )
    add_switch(
        parser,
        "use_stitching_layers",
        "no_stitching_layers",
        True,
        "project to the teacher's width",
    )
    add_switch(
        parser, "stitching_layer_bias", "no_stitching_layer_bias", True, "biases in the projections"
    )
    add(
        "--hidden_state_pictures",
        action="store_true",
        help="write a picture of student and teacher states per block and epoch",
    )


def _add_head_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add_switch(parser, "train_lm_head", "no_train_lm_head", True, "run the head phase")
    add("--lm_head_epochs", type=non_negative_int, default=1, help="passes (default: 1)")
    add("--lm_head_lr", type=positive_float, default=1e-3, help="peak rate (default: 1e-3)")
    add("--lm_head_weight_decay", type=non_negative_float, default=0.01)
    add("--lm_head_max_grad_norm", type=positive_float, default=1.0)
    add("--logit_loss_type", choices=("mse", "kl_div", "ce"), default="kl_div")
    add("--logit_loss_temperature", type=positive_float, default=2.0)
    add(
        "--logit_loss_weight",
        type=non_negative_float,
        default=1.0,
        help="factor on the logit loss, relative to the hidden-state loss (default: 1)",
    )
    add_switch(
        parser,
        "initialize_head_from_teacher",
        "no_initialize_head_from_teacher",
        True,
        "start the head from the teacher's",
    )


def _add_run_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add("--output_dir", default="./distilled_model", help="the run's directory")
    add("--overwrite", action="store_true", help="replace an earlier run in --output_dir")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the fastest there is")
    add("--log_interval", type=positive_int, default=50, help="steps between lines (default: 50)")
    add("--seed", type=non_negative_int, default=0, help="of everything random (default: 0)")
    add("--gradient_accumulation_steps", type=positive_int, default=1)
    add("--lr_schedule", choices=("constant", "cosine", "linear"), default="cosine")
    add("--warmup_ratio", type=probability, default=0.05, help="share of steps (default: 0.05)")
    add("--min_lr_ratio", type=non_negative_float, default=0.1, help="final rate over peak rate")
    add(
        "--max_nonfinite_in_a_row",
        type=positive_int,
        default=10,
        help="batches with a NaN or infinite loss that are skipped before stopping (default: 10)",
    )
    add("--debug", action="store_true", help="show tracebacks and debug messages")


if __name__ == "__main__":
    sys.exit(run_command(main))
