"""The batches that ``run_distillation_example`` trains on and keeps its best weights by."""

import argparse
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from cleangpt.data import TextSource
    from cleangpt.teacher import Teacher

logger = logging.getLogger(__name__)


def build_dataloader(
    arguments: argparse.Namespace, source: "TextSource", teacher: "Teacher"
) -> "DataLoader[Any]":
    """Cut the documents into windows; their order is a function of the seed and the epoch.

    Raises:
        InputError: If packed documents do not fill one window.
    """
    from cleangpt.data import DistillationDataCollator, TextDataset, make_dataloader
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
    return make_dataloader(
        dataset,
        DistillationDataCollator(teacher.tokenizer, arguments.block_size),
        arguments.batch_size,
        seed=arguments.seed,
        num_workers=arguments.num_workers,
    )


def validation_dataloader(
    arguments: argparse.Namespace, teacher: "Teacher"
) -> "DataLoader[Any] | None":
    """Windows of the data set's validation split, as many as the flag says; None if it has none."""
    from torch.utils.data import Subset

    from cleangpt.data import DistillationDataCollator, TextDataset, load_texts, make_dataloader
    from cleangpt.errors import CleanGPTError

    try:
        source = load_texts(
            arguments.dataset_name,
            config_name=arguments.dataset_config_name,
            split="validation",
            text_column=arguments.dataset_text_column,
        )
    except CleanGPTError as error:
        logger.warning("No validation: %s", error.cause)
        arguments.early_stop_patience = 0
        return None
    dataset = TextDataset(source.texts, teacher.tokenizer, arguments.block_size)
    windows = min(len(dataset), max(1, arguments.validation_tokens // arguments.block_size))
    return make_dataloader(
        Subset(dataset, range(windows)),
        DistillationDataCollator(teacher.tokenizer, arguments.block_size),
        arguments.batch_size,
        shuffle=False,
    )
