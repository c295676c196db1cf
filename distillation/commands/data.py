"""The batches that ``run_distillation_example`` trains on and keeps its best weights by."""

import argparse
import logging
from typing import TYPE_CHECKING, Any

from distillation.commands.streaming import check_streaming, streamed_windows, together

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from cleangpt.data import TextDataset, TextSource, TextStream
    from cleangpt.runtime.ranks import Ranks
    from cleangpt.teacher import Teacher

logger = logging.getLogger(__name__)


def find_documents(
    arguments: argparse.Namespace, split: str | None = None
) -> "TextSource | TextStream":
    """The documents that the flags name, or with ``--streaming`` where they are; needs no torch.

    Raises:
        UsageError: If a flag cannot go with ``--streaming``.
        InputError: If the data cannot be used.
    """
    from cleangpt.data import load_texts, open_stream

    check_streaming(arguments)
    own = {
        "config_name": arguments.dataset_config_name,
        "split": split or arguments.dataset_split,
        "text_column": arguments.dataset_text_column,
    }
    if arguments.streaming:
        return open_stream(arguments.dataset_name, **own)
    wanted = arguments.max_samples if split is None else 0
    return load_texts(arguments.dataset_name, max_samples=wanted, **own)


def build_dataloader(
    arguments: argparse.Namespace,
    source: "TextSource | TextStream",
    teacher: "Teacher",
    student: "nn.Module",
    ranks: "Ranks | None" = None,
) -> "DataLoader[Any]":
    """Cut the documents into windows; their order is a function of the seed and the epoch.

    Args:
        arguments: The parsed flags.
        source: The documents.
        teacher: Gives the tokenizer.
        student: Says, of a stream, how large the states of a pass are.
        ranks: The processes of the run, to read a stream together.

    Raises:
        InputError: If the documents do not fill one window.
    """
    from cleangpt.data import DistillationDataCollator, TextStream, make_dataloader

    dataset: Any
    if isinstance(source, TextStream):
        dataset = streamed_windows(arguments, source, teacher, student, together(arguments, ranks))
    else:
        dataset = _windows(arguments, source, teacher)
    return make_dataloader(
        dataset,
        DistillationDataCollator(teacher.tokenizer, arguments.block_size),
        arguments.batch_size,
        seed=arguments.seed,
        num_workers=arguments.num_workers,
    )


def _windows(
    arguments: argparse.Namespace, source: "TextSource", teacher: "Teacher"
) -> "TextDataset":
    from cleangpt.data import TextDataset
    from cleangpt.data.token_cache import default_directory
    from cleangpt.errors import InputError

    cache_dir = arguments.token_cache or default_directory()
    dataset = TextDataset(
        source.texts,
        teacher.tokenizer,
        arguments.block_size,
        packed=arguments.packing,
        cache_dir=None if arguments.no_token_cache else cache_dir,
    )
    if arguments.packing and dataset.num_tokens < arguments.block_size:
        raise InputError(
            f"{source.name} has {dataset.num_tokens} tokens, fewer than one window of"
            f" {arguments.block_size}.",
            "Give it more text, raise --max_samples, or lower --block_size.",
        )
    logger.info(
        "%d documents of %s: %s tokens in %d windows of %s%d",
        len(source.texts),
        source.name,
        f"{dataset.num_tokens:,}",
        len(dataset),
        "" if arguments.packing else "up to ",
        arguments.block_size,
    )
    return dataset


def validation_dataloader(
    arguments: argparse.Namespace,
    teacher: "Teacher",
    loader: "DataLoader[Any]",
    ranks: "Ranks | None" = None,
) -> "DataLoader[Any] | None":
    """Windows of the data set's validation split, as many as the flag says; None if it has none.

    Args:
        arguments: The parsed flags.
        teacher: Gives the tokenizer.
        loader: That of the training windows; its collator makes these batches too.
        ranks: The processes of the run, to read a stream together.
    """
    from torch.utils.data import Subset

    from cleangpt.data import StreamedWindows, TextDataset, TextStream, make_dataloader
    from cleangpt.errors import CleanGPTError

    size = arguments.block_size
    windows = max(1, arguments.validation_tokens // size)
    dataset: StreamedWindows | TextDataset
    try:
        source = find_documents(arguments, "validation")
        if isinstance(source, TextStream):
            dataset = StreamedWindows(
                source,
                teacher.tokenizer,
                size,
                pass_tokens=windows * size,
                ranks=together(arguments, ranks),
            )
        else:
            dataset = TextDataset(source.texts, teacher.tokenizer, size)
    except CleanGPTError as error:
        logger.warning("No validation: %s", error.cause)
        arguments.early_stop_patience = 0
        return None
    return make_dataloader(
        Subset(dataset, range(min(len(dataset), windows))),
        loader.collate_fn,
        arguments.batch_size,
        shuffle=False,
    )
