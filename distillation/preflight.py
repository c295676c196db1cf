"""What the two models, the tokenizer and the data must have in common."""

import logging
from typing import Any

import torch
from torch import Tensor

from cleangpt.blocks import BlockStack
from cleangpt.data.overlap import OVERLAP_WORTH_A_WARNING, contained_share
from cleangpt.errors import CleanGPTError, InputError, UsageError, ran_out_of_memory
from cleangpt.runtime.module_state import preserved_modes
from cleangpt.runtime.ranks import Ranks
from cleangpt.vocabulary import token_rows
from distillation.batch import Batch

logger = logging.getLogger(__name__)

_PROBED = 8
_MOST_ERROR_ALONE = 0.02
"""What bf16 may lose between two ways to run a block."""


@torch.no_grad()
def check_structure(stack: BlockStack) -> None:
    """Refuse a model whose parts cannot be told apart before hours are spent on its blocks.

    Raises:
        InputError: If no final norm is found, or blocks pass on something other than states of
            shape [batch, seq, d_model], such as several parallel streams, or something besides.
    """
    if stack.device.type == "meta":  # a plan's outline computes nothing to look at
        return
    with preserved_modes(stack.model):
        stack.model.eval()
        stack.final_norm  # noqa: B018 - found by looking
        ids = stack.probe_ids()
        state = stack.hidden(stack.embed(ids))
        alone = _error_of_a_block_alone(stack)
    expected = (*ids.shape, stack.hidden_size)
    if tuple(state.shape) != expected:
        raise InputError(
            f"The blocks of {type(stack.model).__name__} pass on states of shape"
            f" {list(state.shape)}; looked for [batch, seq, d_model], here {list(expected)}.",
            "Such a model cannot be distilled: it needs one stream of the model's own width.",
        )
    if alone > (1e-3 if state.dtype == torch.float32 else _MOST_ERROR_ALONE):
        raise InputError(
            f"A block of {type(stack.model).__name__} that is given the state before it returns"
            f" another one than in the whole model (by {alone:.1%}): its blocks pass on more.",
            "Such a model cannot be distilled: its blocks must follow from one another's states.",
        )


def _error_of_a_block_alone(stack: BlockStack) -> float:
    """How far the second block and the last are off when they run alone, as a share of the largest.

    A block that fails alone is off by all.
    """
    ids = stack.unlike_ids(_PROBED)
    states = stack.block_states(ids)
    worst = 0.0
    for index in {min(1, stack.num_blocks - 1), stack.num_blocks - 1}:
        expected = states[index + 1]
        try:
            alone = stack.advance(index, states[index], ids)
        except Exception as error:
            if isinstance(error, CleanGPTError) or ran_out_of_memory(error):
                raise
            return 1.0  # it asks for what another block left: each family fails in its own way
        largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        worst = max(worst, float((alone - expected).abs().max() / largest))
    return worst


def check_widths(teacher: BlockStack, student: BlockStack, *, stitched: bool) -> None:
    """Refuse widths that nothing joins.

    Raises:
        UsageError: If they differ without stitching, or the student was built for another width.
    """
    told = getattr(student.model.config, "teacher_n_embd", None)
    if told is not None and told != teacher.hidden_size:
        raise UsageError(
            f"The student expects teacher_n_embd={told}; this teacher's width is"
            f" {teacher.hidden_size}.",
            f"Set teacher_n_embd={teacher.hidden_size}, or leave it out.",
        )
    if student.hidden_size != teacher.hidden_size and not stitched:
        raise UsageError(
            "Dimension mismatch at block 0 without stitching:"
            f" Student_dim={student.hidden_size}, Teacher_dim={teacher.hidden_size}.",
            "Set use_stitching_layers=True (--use_stitching_layers), or"
            f" n_embd={teacher.hidden_size}.",
        )


def needs_stitches(teacher: BlockStack, student: BlockStack, settings: Any) -> bool:
    """Whether blocks learn through stitches.

    The states of a student that starts from the teacher, and is as wide, start as the teacher's
    own: a stitch would only let them drift away from what the copied weights expect.

    Args:
        teacher: The teacher.
        student: The student.
        settings: Has ``use_stitching_layers``, ``stitch_equal_widths`` and ``init_from_teacher``.
    """
    as_wide = student.hidden_size == teacher.hidden_size and settings.init_from_teacher != "none"
    return bool(settings.use_stitching_layers and (settings.stitch_equal_widths or not as_wide))


def number_blocks(student: BlockStack) -> None:
    """Give blocks that were dropped or copied by hand the numbers by which they find their cache.

    With a number twice, decoding with a cache gives other tokens than without; with one that is too
    high it fails.

    Raises:
        InputError: If one block stands in two places: each has to learn on its own.
    """
    blocks = [student.block(index) for index in range(student.num_blocks)]
    if len({id(block) for block in blocks}) < len(blocks):
        raise InputError(
            f"The {len(blocks)} blocks of the student are {len({id(b) for b in blocks})} modules:"
            " one of them stands in several places.",
            "Put a copy in each place (copy.deepcopy), so that each can learn on its own.",
        )
    numbered: list[list[Any]] = [
        [
            module
            for module in block.modules()
            if isinstance(getattr(module, "layer_idx", None), int)
        ]
        for block in blocks
    ]
    numbers = [modules[0].layer_idx for modules in numbered if modules]
    if len(set(numbers)) == len(numbers) and all(number < len(blocks) for number in numbers):
        return
    logger.warning("The student's blocks were numbered %s; they are numbered anew.", numbers)
    for index, modules in enumerate(numbered):
        for module in modules:
            module.layer_idx = index


def check_vocabulary(teacher: BlockStack, student: BlockStack, tokenizer: Any) -> None:
    """Refuse a student or tokenizer whose token ids are not the teacher's.

    Raises:
        InputError: If a vocabulary is smaller than the token ids that can occur.
    """
    known = token_rows(tokenizer) if tokenizer is not None else teacher.vocab_size
    if known > teacher.vocab_size:
        raise InputError(
            f"The tokenizer's ids need {known} rows; the teacher's vocabulary has"
            f" {teacher.vocab_size}.",
            "Use the tokenizer the teacher was trained with.",
        )
    if student.vocab_size < known:
        raise InputError(
            f"The student's vocabulary has {student.vocab_size} tokens and the teacher's"
            f" {known}; logits over different tokens cannot be compared.",
            f"Build the student with vocab_size={known}.",
        )


def log_shared_rows(teacher: BlockStack, student: BlockStack) -> None:
    """Say which rows logits are compared on, where the models have not equally many.

    The rows beyond them are padding: :func:`check_vocabulary` has seen that both models have those
    of all tokens.
    """
    shared = min(teacher.vocab_size, student.vocab_size)
    if teacher.vocab_size == student.vocab_size:
        return
    logger.info(
        "Vocabulary: the teacher has %d rows and the student %d; logits are compared, and rows"
        " taken over, on the first %d.",
        teacher.vocab_size,
        student.vocab_size,
        shared,
    )
    if student.vocab_size > shared:
        logger.warning(
            "The student's %d rows beyond them stand for no token, and nothing teaches it to avoid"
            " them; vocab_size=%d has none.",
            student.vocab_size - shared,
            shared,
        )


def warn_of_overlap(train_loader: Any, validation_loader: Any) -> float:
    """Say if held-out text was trained on; return the share, 0.0 where loaders do not tell.

    The weights are kept by the loss on that text, which then praises what was learnt by heart.
    """
    train = getattr(train_loader, "dataset", None)
    held_out = getattr(validation_loader, "dataset", None)
    held_out = getattr(held_out, "dataset", held_out)  # a Subset's
    sketch, tokens = getattr(train, "sketch", None), getattr(held_out, "tokens", None)
    if sketch is None or not isinstance(tokens, Tensor):
        return 0.0
    share = contained_share(tokens, sketch)
    if share >= OVERLAP_WORTH_A_WARNING:
        logger.warning(
            "%.0f %% of the validation text is in the training text: a validation loss on it says"
            " little. Give other held-out text.",
            100 * share,
        )
    return share


def check_same_batches(ranks: Ranks, batch: Batch) -> None:
    """Refuse data that the processes of a run do not see in one order.

    Raises:
        InputError: If this process's batch is not that of the others.
    """
    if not ranks.same_everywhere(b"".join(batch.row_keys).hex()):
        raise InputError(
            "The processes of this run were given different batches; each must see all of them, in"
            " one order, and computes its share of the rows itself.",
            "Seed the train_dataloader's shuffling, and give it no DistributedSampler.",
        )


def check_batch(batch: Batch, teacher: BlockStack, student: BlockStack) -> None:
    """Refuse token ids and lengths that one of the models cannot take.

    Raises:
        InputError: If a token id is outside of a vocabulary.
        UsageError: If the sequences are longer than a model's context.
    """
    highest = int(batch.host_ids.max()) if batch.host_ids.numel() else 0
    seq_len = batch.input_ids.shape[1]
    for role, stack in (("teacher", teacher), ("student", student)):
        if highest >= stack.vocab_size:
            raise InputError(
                f"Token id {highest} is outside of the {role}'s vocabulary of {stack.vocab_size}.",
                "Use the teacher's own tokenizer, and give the student the teacher's vocab_size.",
            )
        if stack.context_length is not None and seq_len > stack.context_length:
            raise UsageError(
                f"A batch has sequences of {seq_len} tokens, and the {role}'s context is"
                f" {stack.context_length}.",
                f"Set block_size to {stack.context_length} or less.",
            )
