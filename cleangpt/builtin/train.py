"""Train the built-in teacher: ``python -m cleangpt.builtin.train --output_dir runs/teacher``.

Gathers the built-in text, learns the tokenizer from its training split, trains a GPT-2 on it, and
writes ``<output_dir>/teacher`` (weights in fp16, tokenizer, model card with measured figures) and
``<output_dir>/checkpoint.pt``. The same command continues a stopped run, with the same result as
one that was never stopped. ``--minutes 0`` writes the teacher from the checkpoint and trains
nothing.

The shipped teacher is ``<output_dir>/teacher`` of the command on its model card, copied to
``cleangpt/builtin/assets``.
"""

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser; needs no heavy import."""
    parser = argparse.ArgumentParser(
        prog="python -m cleangpt.builtin.train",
        description="Train the built-in teacher on the text that every CPython carries.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/builtin_teacher"), help="where to write")
    add("--minutes", type=float, help="stop after this many minutes; 0 only writes the teacher")
    add("--steps", type=int, help="optimizer steps of the whole run")
    add("--batch_size", type=int, help="windows per step")
    add("--context_length", type=int, help="window length in tokens")
    add("--vocab_size", type=int, help="tokens in the vocabulary")
    add("--n_layer", type=int, help="blocks")
    add("--n_embd", type=int, help="width")
    add("--n_head", type=int, help="attention heads")
    add("--dropout", type=float, help="on embeddings and residual branches")
    add("--learning_rate", type=float, help="peak learning rate")
    add("--weight_decay", type=float, help="on matrices only")
    add("--eval_every", type=int, help="steps between validations and checkpoints")
    add("--seed", type=int, help="seed of weights, windows and dropout")
    add("--no_bf16", dest="bf16", action="store_false", default=None, help="all in float32")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train, or continue to train, and write the teacher's folder."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from cleangpt.builtin import builtin_texts
    from cleangpt.builtin.export import export_teacher
    from cleangpt.builtin.pretraining import (
        PretrainingSettings,
        initial_state,
        load_checkpoint,
        train,
    )
    from cleangpt.builtin.tokenizer import token_stream, train_tokenizer

    chosen = {k: v for k, v in vars(arguments).items() if v is not None}
    output_dir = chosen.pop("output_dir")
    minutes = chosen.pop("minutes", float("inf"))
    settings = PretrainingSettings(**chosen)
    texts = {split: builtin_texts(split) for split in ("train", "validation", "test")}
    tokenizer = train_tokenizer(texts["train"], settings.vocab_size, settings.context_length)
    streams = {split: token_stream(tokenizer, part) for split, part in texts.items()}
    logger.info("tokens: %s", ", ".join(f"{k} {v.numel():,}" for k, v in streams.items()))
    state = initial_state(settings, tokenizer.eos_token_id)
    checkpoint = output_dir / "checkpoint.pt"
    if checkpoint.exists():
        load_checkpoint(state, settings, checkpoint)
        logger.info("continuing %s at step %d of %d", checkpoint, state.step, settings.steps)
    train(state, settings, streams, checkpoint, minutes)
    folder = export_teacher(state, settings, tokenizer, streams, output_dir / "teacher")
    logger.info("wrote %s", folder)


if __name__ == "__main__":
    main()
