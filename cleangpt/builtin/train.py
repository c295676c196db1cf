"""Train the built-in teacher: ``python -m cleangpt.builtin.train --output_dir runs/teacher``.

Gathers the built-in text, learns the tokenizer from its training split, trains a GPT-2 on it, and
writes ``<output_dir>/teacher`` (weights in fp16, tokenizer, model card with measured figures) and
``<output_dir>/checkpoint.pt``. The same command continues a stopped run, with the same result as
one that was never stopped. ``--minutes 0`` writes the teacher from the checkpoint and trains
nothing.

The shipped teacher is ``<output_dir>/teacher`` of the command on its model card, copied to
``cleangpt/builtin/assets``.
"""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Final

from cleangpt.builtin.settings import PretrainingSettings
from cleangpt.cli import (
    CommandParser,
    add_switch,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    probability,
    run_command,
    setup_logging,
)

logger = logging.getLogger(__name__)

# Name of the setting: its type and its meaning. The defaults are those of PretrainingSettings.
FLAGS: Final = {
    "vocab_size": (positive_int, "tokens in the vocabulary, 257 or more"),
    "context_length": (positive_int, "window length, in tokens"),
    "n_layer": (positive_int, "blocks"),
    "n_embd": (positive_int, "width"),
    "n_head": (positive_int, "attention heads per block"),
    "dropout": (probability, "on embeddings and residual branches"),
    "batch_size": (positive_int, "windows per step"),
    "steps": (positive_int, "optimizer steps of the whole run"),
    "learning_rate": (positive_float, "peak learning rate"),
    "warmup_steps": (non_negative_int, "steps of linear warm-up"),
    "cooldown": (probability, "last share of the steps, in which the rate falls to zero"),
    "weight_decay": (non_negative_float, "on the blocks' matrices"),
    "max_grad_norm": (positive_float, "gradient clipping"),
    "average_decay": (probability, "decay per step of the average of the weights"),
    "eval_every": (positive_int, "steps between two validations and checkpoints"),
    "seed": (non_negative_int, "of weights, windows and dropout"),
}


def build_parser() -> CommandParser:
    """Return the command's parser; needs no heavy import."""
    parser = CommandParser(
        prog="python -m cleangpt.builtin.train",
        description="Train the built-in teacher on the text that every CPython carries.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/builtin_teacher"),
        help="where checkpoint.pt and teacher/ go (default: runs/builtin_teacher)",
    )
    parser.add_argument(
        "--minutes",
        type=non_negative_float,
        default=None,
        help="stop after this long; 0 writes the teacher from the checkpoint (default: no limit)",
    )
    defaults = {field.name: field.default for field in fields(PretrainingSettings)}
    for name, (kind, meaning) in FLAGS.items():
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=defaults[name],
            help=f"{meaning} (default: {defaults[name]})",
        )
    add_switch(parser, "bf16", "no_bf16", PretrainingSettings.bf16, "matrix products in bfloat16")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train, or continue to train, and write the teacher's folder."""
    flags = vars(build_parser().parse_args(argv))
    setup_logging(flags.pop("debug"))
    output_dir = flags.pop("output_dir")
    minutes = flags.pop("minutes")
    settings = PretrainingSettings(**flags)

    from cleangpt.builtin import builtin_texts
    from cleangpt.builtin.export import export_teacher
    from cleangpt.builtin.pretraining import initial_state, load_checkpoint, train
    from cleangpt.builtin.tokenizer import token_stream, train_tokenizer

    texts = {split: builtin_texts(split) for split in ("train", "validation", "test")}
    tokenizer = train_tokenizer(texts["train"], settings.vocab_size, settings.context_length)
    streams = {split: token_stream(tokenizer, part) for split, part in texts.items()}
    logger.info("tokens: %s", ", ".join(f"{k} {v.numel():,}" for k, v in streams.items()))
    state = initial_state(settings, tokenizer.eos_token_id)
    checkpoint = output_dir / "checkpoint.pt"
    if checkpoint.exists():
        load_checkpoint(state, settings, checkpoint)
        logger.info("continuing %s at step %d of %d", checkpoint, state.step, settings.steps)
    train(state, settings, streams, checkpoint, float("inf") if minutes is None else minutes)
    folder = export_teacher(state, settings, tokenizer, streams, output_dir / "teacher")
    logger.info("wrote %s", folder)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
