"""The flags of ``run_distillation_example``: name, type, default, and what each one does."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from cleangpt.cli import (
    CommandParser,
    add_switch,
    non_negative_float,
    non_negative_int,
    number_or_list,
    positive_float,
    positive_int,
    probability,
    program_name,
)
from cleangpt.settings_file import add_config_flags
from config_distillation import MODEL_TYPES
from distillation.commands.scale import add_scale_flags
from distillation.commands.streaming import add_streaming_flags
from distillation.commands.student_flags import HF_STUDENT
from distillation.layer_map import LAYER_MAPS, MEASURED

PROGRAM = "examples.run_distillation_example"
Row = tuple[str, Callable[[str], Any], Any, str]

MOST_BLOCKS = 10_000
TRACKER_NAMES = ("tensorboard", "wandb", "trackio")
PER_BLOCK = "; one value, or one per block as 1e-3,5e-4"
STUDENT_SWITCHES = {
    "bias": "biases in the blocks' linear maps and norms",
    "use_proj": "an output projection in Factored and SASP blocks",
    "use_v": "a value matrix in Factored and SASP blocks",
    "use_channel_factor_v": "a Kronecker value map",
    "use_channel_factor_proj": "a Kronecker output projection",
}
DATA_ROWS: tuple[Row, ...] = (
    ("dataset_split", str, "train", "split to train on"),
    ("max_samples", non_negative_int, 0, "use the first so many documents; 0 is all"),
    ("block_size", positive_int, 128, "tokens per window, the student's context length"),
    ("batch_size", positive_int, 8, "windows per batch"),
    (
        "num_workers",
        non_negative_int,
        0,
        "processes that prepare batches; seldom of use, as the tokens are in memory and making a"
        " batch of them takes a tenth of a millisecond",
    ),
)
BACKBONE_ROWS: tuple[Row, ...] = (
    ("epochs_per_block", number_or_list(non_negative_int), 3, f"passes per block{PER_BLOCK}"),
    ("lr_per_block", number_or_list(positive_float), 1e-3, f"peak learning rate{PER_BLOCK}"),
    (
        "weight_decay_per_block",
        number_or_list(non_negative_float),
        0.01,
        f"weight decay of matrices{PER_BLOCK}",
    ),
    (
        "max_grad_norm_per_block",
        number_or_list(positive_float),
        1.0,
        f"gradient clipping{PER_BLOCK}",
    ),
    ("distill_loss_temperature", positive_float, 1.0, "temperature of the hidden kl_div"),
    (
        "first_hidden_position",
        non_negative_int,
        0,
        "leave earlier positions of each window out of the hidden-state loss",
    ),
)
HEAD_ROWS: tuple[Row, ...] = (
    ("lm_head_epochs", non_negative_int, 3, "passes over the data in the head phase"),
    ("lm_head_lr", positive_float, 1e-4, "peak learning rate of the head phase"),
    ("lm_head_weight_decay", non_negative_float, 0.01, "weight decay of the head's matrix"),
    ("lm_head_max_grad_norm", positive_float, 1.0, "gradient clipping in the head phase"),
    ("logit_loss_temperature", positive_float, 2.0, "temperature of kl_div and ce"),
    (
        "logit_loss_weight",
        non_negative_float,
        1.0,
        "factor on the logit loss, relative to the hidden-state loss",
    ),
)
POLISH_ROWS: tuple[Row, ...] = (
    ("polish_epochs", non_negative_int, 0, "passes in which the whole student learns; 0 is none"),
    ("polish_lr", positive_float, 1e-3, "peak learning rate of the polish"),
    ("polish_weight_decay", non_negative_float, 0.01, "weight decay of matrices in the polish"),
    ("polish_max_grad_norm", positive_float, 1.0, "gradient clipping in the polish"),
    (
        "polish_hidden_weight",
        non_negative_float,
        0.0,
        "factor on the hidden-state losses of all blocks in the polish",
    ),
    ("audit_tokens", non_negative_int, 8192, "tokens to measure the teacher's states on"),
    (
        "early_stop_patience",
        non_negative_int,
        0,
        "epochs without a better validation loss after which a stage ends; 0 is never",
    ),
    (
        "validation_tokens",
        non_negative_int,
        0,
        "tokens of held-out text that each stage keeps its best weights by; 0 is none",
    ),
)
RUN_ROWS: tuple[Row, ...] = (
    ("output_dir", str, "./distilled_model", "the run's directory"),
    ("log_interval", positive_int, 50, "optimizer steps between two lines"),
    ("seed", non_negative_int, 0, "seed of everything random"),
    ("threads", non_negative_int, 0, "threads of the CPU; 0 chooses by the cores it may use"),
    ("checkpoint_minutes", non_negative_float, 10.0, "between two checkpoints; 0 is never"),
    ("checkpoint_steps", non_negative_int, 0, "steps between two more checkpoints; 0 is never"),
    ("gradient_accumulation_steps", positive_int, 1, "batches per optimizer step"),
    ("warmup_ratio", probability, 0.05, "share of a stage's steps spent warming up"),
    ("min_lr_ratio", probability, 0.1, "last learning rate as a share of the peak"),
    (
        "max_nonfinite_in_a_row",
        positive_int,
        10,
        "batches with a NaN or infinite loss that are skipped before stopping",
    ),
)


def build_parser(module: str = PROGRAM) -> CommandParser:
    """Return the parser of a command that takes a run's flags; needs no heavy import.

    Args:
        module: What ``python -m`` starts, for the messages.
    """
    parser = CommandParser(
        prog=program_name(module),
        description="Distil a HuggingFace causal language model into a smaller one, by blocks.",
    )
    _add_model_flags(parser)
    _add_data_flags(parser)
    _add_stage_flags(parser)
    _add_run_flags(parser)
    add_scale_flags(parser)
    add_config_flags(parser)
    return parser


def method_flags() -> set[str]:
    """What a recipe may say: how the student learns."""
    parser = CommandParser()
    _add_stage_flags(parser)
    return {action.dest for action in parser._actions} - {"help"}


def layer_map(text: str) -> str | list[int]:
    """The type of ``--layer_map``: a name, or indices."""
    if text in (*LAYER_MAPS, MEASURED):
        return text
    if not all(part.strip().isdecimal() for part in text.split(",")):
        known = ", ".join((*LAYER_MAPS, MEASURED))
        raise argparse.ArgumentTypeError(f"{text!r} is not {known}, nor blocks such as 1,3,5")
    return [int(part) for part in text.split(",")]


def block_ranges(text: str) -> list[int]:
    """The type of ``--blocks``: indices and ranges of them, as 0,3-5."""
    found: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if (
            len(ends) > 2
            or not all(end.isdecimal() for end in ends)
            or not int(ends[0]) <= int(ends[-1]) < MOST_BLOCKS
        ):
            raise argparse.ArgumentTypeError(f"{text!r} is not blocks such as 3-5 or 0,2")
        found += range(int(ends[0]), int(ends[-1]) + 1)
    return found


def tracker_names(text: str) -> list[str]:
    """The type of ``--track``: names with commas between."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TRACKER_NAMES:
            known = ", ".join(TRACKER_NAMES)
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {known}")
    return names


def _add_rows(parser: CommandParser, rows: Sequence[Row]) -> None:
    for name, kind, default, text in rows:
        shown = f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=shown)


def _add_choice(
    parser: CommandParser, name: str, choices: Sequence[str], default: str, text: str
) -> None:
    shown = f"{text} (default: {default})"
    parser.add_argument(f"--{name}", choices=choices, default=default, help=shown)


def _add_model_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add(
        "--teacher_model_name_or_path",
        default="builtin",
        help="builtin, smollm2, a folder, a .gguf file or a hub name (default: builtin)",
    )
    add("--teacher_revision", help="revision of a teacher from the hub (default: its newest)")
    add(
        "--trust_remote_code",
        action="store_true",
        help="let code inside the teacher's folder run (default: off)",
    )
    kinds = (*MODEL_TYPES, HF_STUDENT)
    meaning = "kind of student; hf is of the teacher's own architecture, or see --student_config"
    _add_choice(parser, "student_model_type", kinds, "Vanilla", meaning)
    add(
        "--student_config",
        metavar="DIR_OR_JSON",
        help="of an hf student: a folder, whose weights it starts from if it has any, or a JSON"
        " file of its configuration (default: the teacher's architecture)",
    )
    add(
        "--start_student",
        metavar="PATH",
        help="go on with a student that exists: a run's folder, a .pt file, a HuggingFace folder"
        " (default: a new one)",
    )
    add("--student_n_layer", type=positive_int, help="blocks (default: as many as the teacher)")
    add("--student_n_embd", type=positive_int, help="width (default: half of the teacher's)")
    add("--student_n_head", type=positive_int, help="heads (default: the teacher's)")
    _add_rows(parser, [("student_dropout", probability, 0.0, "dropout rate while training")])
    for name, text in STUDENT_SWITCHES.items():
        add(f"--student_{name}", action="store_true", help=f"{text} (default: off)")
    add(
        "--layer_map",
        type=layer_map,
        default="uniform",
        metavar="MAP",
        help="which teacher block each student block learns from: uniform (spread, last to last),"
        " first, last, measured (it starts from the blocks that the teacher can least do without),"
        " or one per student block as 1,3,5 or 0,0,1 (default: uniform)",
    )
    meaning = "student blocks that learn, as 3-5 or 0,2; others stay (default: all)"
    add("--blocks", type=block_ranges, metavar="BLOCKS", help=meaning)


def _add_data_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add(
        "--dataset_name",
        default="builtin",
        help="builtin, a .txt .jsonl .parquet .csv file, a folder of them, or a data set's name"
        " (default: builtin)",
    )
    add("--dataset_config_name", help="configuration of the data set (default: its only one)")
    add("--dataset_text_column", help="column with the text (default: found)")
    _add_rows(parser, DATA_ROWS)
    add_streaming_flags(parser)
    packing = "let windows run over the ends of documents, so that none is padded"
    add_switch(parser, "packing", "no_packing", True, packing)
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--token_cache",
        metavar="DIR",
        help="where the tokens of long texts are kept for the next run; may be deleted at any time"
        " (default: tokens/ in $CLEANGPT_CACHE, or in cleangpt/ of $XDG_CACHE_HOME or ~/.cache)",
    )
    cache.add_argument(
        "--no_token_cache", action="store_true", help="neither keep nor use them (default: off)"
    )


def _add_stage_flags(parser: CommandParser) -> None:
    parser.add_argument(
        "--recipe",
        metavar="best|tutorial|FILE",
        help="what the flags below are where none is given, by name or as a YAML file of them"
        " (default: best, or tutorial once one of them is given); the defaults they show are the"
        " tutorial's",
    )
    switches = {
        "freeze_previous_blocks": ("no_freeze_previous_blocks", "keep earlier blocks fixed"),
        "use_stitching_layers": ("no_stitching_layers", "project to the teacher's width"),
        "stitching_layer_bias": ("no_stitching_layer_bias", "biases in the projections"),
        "stitch_equal_widths": (
            "no_stitch_equal_widths",
            "the same for a student as wide as the teacher that starts from it",
        ),
        "train_stitches": ("no_train_stitches", "let the projections learn"),
        "train_lm_head": ("no_train_lm_head", "run the head phase"),
        "initialize_head_from_teacher": (
            "no_initialize_head_from_teacher",
            "start the head from the teacher's",
        ),
        "polish_hidden_fade": ("no_polish_hidden_fade", "let that factor fall to zero"),
        "overfit_gate": ("no_overfit_gate", "let every stage show on a small batch that it learns"),
    }
    orders = ("sequential", "parallel_local", "decoupled")
    meaning = "blocks in turn, all in one pass, or each in a process of its own"
    _add_choice(parser, "schedule", orders, "sequential", meaning)
    inputs = ("student", "teacher", "mixed")
    meaning = "what enters a block while it learns; mixed goes over from the teacher's states"
    _add_choice(parser, "block_inputs", inputs, "student", meaning)
    _add_rows(parser, BACKBONE_ROWS)
    hidden = ("mse", "kl_div", "nmse", "cosine", "smooth_l1", "whiten")
    logit = ("mse", "kl_div", "ce")
    _add_choice(parser, "distill_loss_type", hidden, "mse", "loss on hidden states")
    starts = ("none", "pca", "slice", "layers")
    _add_choice(parser, "init_from_teacher", starts, "none", "what the student starts from")
    ways = ("random", "least_squares")
    _add_choice(parser, "stitch_start", ways, "random", "what each stitch starts from")
    ways = ("least_squares", "fold")
    _add_choice(parser, "head_start", ways, "least_squares", "how the teacher's head is reduced")
    meaning = "whether the head has a weight of its own"
    _add_choice(parser, "head_tying", ("untie", "tie"), "untie", meaning)
    _add_rows(parser, HEAD_ROWS)
    meaning = "loss on logits; ce is against the teacher's most probable token"
    _add_choice(parser, "logit_loss_type", logit, "kl_div", meaning)
    for name, (negative, text) in switches.items():
        add_switch(parser, name, negative, name != "overfit_gate", text)
    _add_rows(parser, POLISH_ROWS)


def _add_run_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    _add_rows(parser, RUN_ROWS)
    caches = ("auto", "ram", "disk", "off")
    _add_choice(parser, "activation_cache", caches, "auto", "where frozen states are kept")
    limit = "GB that frozen states may take (default: half of what is free)"
    add("--activation_cache_gb", type=positive_float, help=limit)
    meaning = "what frozen states are kept in; fp32 is exact, bf16 half the size"
    _add_choice(parser, "activation_dtype", ("fp32", "bf16"), "fp32", meaning)
    precisions = ("auto", "fp32", "bf16")
    meaning = "of matrix products; auto measures whether bf16 is faster"
    _add_choice(parser, "precision", precisions, "auto", meaning)
    schedules = ("constant", "cosine", "linear")
    _add_choice(parser, "lr_schedule", schedules, "cosine", "per stage, after the warm-up")
    add(
        "--track",
        type=tracker_names,
        default=[],
        metavar="NAMES",
        help="also show the curves in tensorboard, wandb or trackio, or several as"
        " tensorboard,wandb (default: none; metrics.jsonl and metrics.csv are always written)",
    )
    fastest = "where to train (default: the fastest there is)"
    add("--device", choices=("cpu", "cuda", "mps"), help=fastest)
    for name, text in (
        ("plan", "only print stages, time, memory and disk; nothing is loaded or trained"),
        ("compile_blocks", "torch.compile each student block, and the logit loss on a GPU"),
        ("resume", "go on with a run that was stopped in --output_dir, or begin one"),
        ("overwrite", "replace an earlier run in --output_dir"),
        ("keep_start", "also save the untrained student, in start/"),
        ("keep_activations", "keep the files of frozen states after the run"),
        ("hidden_state_pictures", "draw student and teacher states per block and epoch"),
        ("debug", "show tracebacks and debug messages"),
    ):
        add(f"--{name}", action="store_true", help=f"{text} (default: off)")
