"""``--streaming``: its flags, what cannot go with it, and the windows it trains on."""

import argparse
import logging
from typing import TYPE_CHECKING

from cleangpt.cli import CommandParser, non_negative_int
from cleangpt.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from cleangpt.data import StreamedWindows, TextStream
    from cleangpt.runtime.ranks import Ranks
    from cleangpt.teacher import Teacher

logger = logging.getLogger(__name__)


def add_streaming_flags(parser: CommandParser) -> None:
    """Add the flags; needs no heavy import."""
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="read the data as they are needed, through `datasets`, and keep nothing of them but"
        " one pass: for data that do not fit. A pass is as large as the states that"
        " --activation_cache_gb holds (default: off)",
    )
    parser.add_argument(
        "--stream_tokens",
        type=non_negative_int,
        default=0,
        help="with --streaming, train on the first so many tokens, in as many passes as that takes;"
        " 0 is one pass (default: 0)",
    )


def check_streaming(arguments: argparse.Namespace) -> None:
    """Refuse flags that would do nothing, or cannot be done, with a stream.

    Raises:
        UsageError: Naming them.
    """
    if not arguments.streaming:
        if arguments.stream_tokens:
            raise UsageError(
                "--stream_tokens counts the tokens of a stream, and nothing is streamed.",
                "Add --streaming, or leave --stream_tokens out.",
            )
        return
    reasons = {
        "no_packing": (not arguments.packing, "every window of a stream is full"),
        "max_samples": (arguments.max_samples > 0, "--stream_tokens says how much is read"),
        "num_workers": (arguments.num_workers > 0, "a pass is in memory"),
        "token_cache": (arguments.token_cache is not None, "nothing of a stream is kept on disk"),
        "keep_activations": (arguments.keep_activations, "files would hold the last pass alone"),
    }
    wrong = {name: why for name, (is_set, why) in reasons.items() if is_set}
    if wrong:
        raise UsageError(
            "--streaming cannot go with "
            + "; ".join(f"--{name} ({why})" for name, why in wrong.items())
            + ".",
            f"Leave out --streaming or --{', --'.join(wrong)}.",
        )


def streamed_windows(
    arguments: argparse.Namespace,
    stream: "TextStream",
    teacher: "Teacher",
    student: "nn.Module",
    ranks: "Ranks | None" = None,
) -> "StreamedWindows":
    """The windows that the flags ask for, and a line about them in the log.

    Raises:
        UsageError: If the states of one batch do not fit into ``--activation_cache_gb``.
        InputError: If the stream does not fill one window.
    """
    from cleangpt.data import StreamedWindows

    windows = StreamedWindows(
        stream,
        teacher.tokenizer,
        arguments.block_size,
        tokens=arguments.stream_tokens,
        pass_tokens=pass_tokens(arguments, teacher, student),
        ranks=ranks,
    )
    logger.info(
        "A stream of %s: %s tokens in %d passes of %d windows of %d",
        stream.name,
        f"{windows.passes * windows.num_tokens:,}",
        windows.passes,
        len(windows),
        arguments.block_size,
    )
    return windows


def together(arguments: argparse.Namespace, ranks: "Ranks | None") -> "Ranks | None":
    """The processes that read a stream together; None where each goes through it by itself."""
    return None if arguments.schedule == "decoupled" else ranks


def pass_tokens(arguments: argparse.Namespace, teacher: "Teacher", student: "nn.Module") -> int:
    """Tokens of a pass, at most: those whose states the byte budget holds, held-out ones apart.

    A function of the flags alone: with free memory in it, a run could not be repeated.
    """
    from cleangpt.blocks import BlockStack
    from cleangpt.data.streamed_windows import PASS_TOKENS
    from distillation.cache_plan import tokens_that_fit
    from distillation.planning import small_widths

    limit = arguments.activation_cache_gb
    if limit is None or arguments.activation_cache == "off":
        return PASS_TOKENS
    teaches_all = arguments.schedule == "parallel_local" or (
        arguments.polish_epochs > 0 and arguments.polish_hidden_weight > 0
    )
    teaching = min(BlockStack(model).num_blocks for model in (teacher.model, student))
    fit = tokens_that_fit(
        int(limit * 1e9),
        small_widths(teacher.model, student, arguments.block_inputs),
        arguments.activation_dtype,
        teaching * teaches_all,
    )
    room, batch = fit - arguments.validation_tokens, arguments.batch_size * arguments.block_size
    if room < batch:
        raise UsageError(
            f"--activation_cache_gb {limit:g} holds the states of {fit:,} tokens, fewer than one"
            f" batch ({batch:,}) and --validation_tokens ({arguments.validation_tokens:,}) take.",
            "Raise it, lower --validation_tokens, or set --activation_cache off.",
        )
    return room
