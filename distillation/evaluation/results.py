"""What an evaluation measures: its settings and its result, key by key.

``EvaluationResult`` is exactly what ``results.json`` holds. A number that is NaN or infinite is
``null`` there, and its place is listed under ``non_finite``, so a broken model is never mistaken
for a missing measurement. This file computes nothing; ``evaluator.py`` fills it in.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

FORMAT_VERSION = 1


@dataclass(frozen=True)
class EvaluationSettings:
    """How to measure. Every field has a default that suits a small model on a CPU.

    Args:
        seq_len: Context length in tokens; 0 takes the longest that all models share, at most 1024.
            A longer one than a model can read is cut to it, with a note.
        stride: Tokens scored per window, 1 to ``seq_len``; 0 means half of ``seq_len``. A smaller
            stride gives every token more context and costs more windows.
        batch_size: Windows per forward pass. It changes speed and memory, never a result.
        max_tokens: Score at most this many tokens; 0 scores all of them.
        max_hidden_tokens: Compare hidden states on at most this many tokens; 0 compares all.
        num_prompts: Prompts of the generation comparison cut from the texts; 0 makes none.
        prompts: Prompts to use in place of those cut from the texts.
        max_new_tokens: New tokens per generated text.
        temperature: Softmax temperature of the sampled texts, > 0.
        seed: Seed of the sampled texts, the same for every model.
        speed_seconds: Time budget of the speed measurement in seconds; 0 skips it.
        num_workers: Processes that prepare batches; 0 prepares them in this one.
    """

    seq_len: int = 0
    stride: int = 0
    batch_size: int = 8
    max_tokens: int = 0
    max_hidden_tokens: int = 32_768
    num_prompts: int = 0
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 40
    temperature: float = 0.8
    seed: int = 0
    speed_seconds: float = 4.0
    num_workers: int = 0


class SizeResult(TypedDict):
    """How large a model is.

    Keys:
        parameters: Stored parameters; a tied tensor counts once.
        embedding_parameters: Of these, token and position embeddings and the output head.
        non_embedding_parameters: The rest.
        size_bytes: Memory of the parameters in the precision they were evaluated in.
        num_blocks, hidden_size, vocab_size: The shape.
        context_length: Longest input in tokens; null if the model sets no limit.
    """

    parameters: int
    embedding_parameters: int
    non_embedding_parameters: int
    size_bytes: int
    num_blocks: int
    hidden_size: int
    vocab_size: int
    context_length: int | None


class QualityResult(TypedDict):
    """How well a model predicts the text, and how like the teacher; all over the same tokens.

    Keys:
        loss_nats: Mean negative log likelihood in nats per token.
        perplexity: exp(loss_nats).
        perplexity_ratio: Perplexity divided by the teacher's; 1.0 is as good.
        bits_per_byte: Bits per UTF-8 byte of the text; comparable across tokenizers.
        kl_nats: Mean KL(teacher || model) in nats per token; 0 for the teacher itself.
        top1_agreement: Fraction of tokens where both put the same token first, 0 to 1.
        calibration_error: Expected calibration error, 0 to 1: how far the probability of the first
            token is from how often it comes, mean over fifteen bins of that probability.
        num_tokens: Tokens scored.
    """

    loss_nats: float
    perplexity: float
    perplexity_ratio: float
    bits_per_byte: float
    kl_nats: float
    top1_agreement: float
    calibration_error: float
    num_tokens: int


class SpeedResult(TypedDict):
    """How fast a model is on this machine; models take turns, and the median is reported.

    Keys:
        forward_tokens_per_second: One full window at a time, no cache.
        decode_tokens_per_second: ``generate``, greedy, batch 1, with the cache.
        repeats: Timed runs behind the smaller of the two medians.
        peak_memory_bytes: Weights, plus the peak of what one forward allocates on the device; null
            on a CPU, where the resident size would count other models too.
    """

    forward_tokens_per_second: float
    decode_tokens_per_second: float | None
    repeats: int
    peak_memory_bytes: int | None


class ModelResult(TypedDict):
    """One row of the comparison.

    Keys:
        name: Name shown in tables and plots.
        role: "teacher", "student" or "baseline".
        source: Where the model came from.
        size, quality, speed: See their own types; ``speed`` is null if it was not measured.
    """

    name: str
    role: Literal["teacher", "student", "baseline"]
    source: str
    size: SizeResult
    quality: QualityResult
    speed: SpeedResult | None


class BlockError(TypedDict):
    """How far one student block is from its teacher block, over all valid positions.

    Keys:
        student_block, teacher_block: Indices from 0; both are raw outputs, before the final norm.
        mse: Mean squared error per channel.
        relative_error: Squared error divided by that of the teacher's own mean; 1.0 is what
            a constant prediction reaches, 0 is perfect. Chained: the block's input is what the
            student's own blocks before it make.
        local_error: The same share as the run recorded it when the block had learnt: on the inputs
            it learnt from, training text, and states as its loss compares them. Null if the run
            recorded none.
        cosine: Mean cosine similarity of the vectors.
    """

    student_block: int
    teacher_block: int
    mse: float
    relative_error: float
    local_error: float | None
    cosine: float


class HybridResult(TypedDict):
    """The teacher with a student block in place of the blocks it stands for.

    Keys:
        student_block: Index from 0.
        kl_alone: KL(teacher || hybrid) in nats per token with this block alone put in.
        kl_chained: The same with all student blocks up to this one put in.
    """

    student_block: int
    kl_alone: float
    kl_chained: float


class HiddenResult(TypedDict):
    """The hidden-state comparison of the student.

    Keys:
        stitch: "saved" (the run's own stitching layers), "identity" (equal widths, none saved) or
            "least_squares" (none saved: fitted on every other window, measured on the rest).
        num_positions: Positions measured.
        blocks: One entry per student block.
        hybrids: One entry per student block; none where states of the two models differ in width.
        similarity: Linear CKA of every student block (rows) with every teacher block (columns),
            0 to 1; null where there is too little text. See ``similarity.py``.
    """

    stitch: Literal["saved", "identity", "least_squares"]
    num_positions: int
    blocks: list[BlockError]
    hybrids: list[HybridResult]
    similarity: list[list[float]] | None


class Generation(TypedDict):
    """The continuations of one prompt.

    Keys:
        mode: "greedy" or "sampled".
        prompt: The prompt, cut on the left to what the context holds.
        reference: What the text itself goes on with; empty for a prompt of the user's.
        continuations: Model name to continuation, without the prompt.
    """

    mode: Literal["greedy", "sampled"]
    prompt: str
    reference: str
    continuations: dict[str, str]


class OwnText(TypedDict):
    """One model on the text it writes itself; all over the same positions of the same windows.

    Keys:
        name: The model's, as in the other tables.
        kl_text_nats: Mean KL(teacher || model) in nats per token, on the text itself.
        kl_text_quarters: The same for each quarter of what follows a beginning, in order.
        kl_nats: KL as above, on the model's own continuations, sampled at temperature 1.
        kl_quarters: The same for each quarter of the continuations, in order.
        teacher_loss_nats: The teacher's mean negative log likelihood of those tokens.
        repetition: Of the greedy continuations, the share of 4-grams that repeat an earlier one.
    """

    name: str
    kl_text_nats: float
    kl_text_quarters: list[float]
    kl_nats: float
    kl_quarters: list[float]
    teacher_loss_nats: float
    repetition: float


class OwnTextResult(TypedDict):
    """What the models make of text they write themselves; see ``own_text.py``.

    Keys:
        num_windows: Beginnings that were continued.
        prompt_tokens, new_tokens: Length of a beginning, and of what follows.
        text_loss_nats: The teacher's loss on what the text itself goes on with.
        text_repetition: The text's own share of repeated 4-grams.
        models: In the usual order; those that cannot generate are left out.
    """

    num_windows: int
    prompt_tokens: int
    new_tokens: int
    text_loss_nats: float
    text_repetition: float
    models: list[OwnText]


class DataResult(TypedDict):
    """The text of the evaluation.

    Keys:
        name, split: Where the text came from.
        fingerprint: SHA-256 of the texts; equal for equal texts.
        num_documents, num_tokens, num_bytes: Size of what was read.
        seq_len, stride, num_windows: The sliding window.
    """

    name: str
    split: str
    fingerprint: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    seq_len: int
    stride: int
    num_windows: int


class EvaluationResult(TypedDict):
    """Everything an evaluation found.

    Keys:
        format_version: Raised when the meaning of a key changes.
        models: Teacher first, then the student, then baselines.
        hidden_states: Null if the student could not be compared; ``notes`` says why.
        generations: Empty unless asked for.
        generation_settings: What ``generations`` were made with, the same for every model.
        own_text: Null unless generations were asked for, or where there is no room for it.
        data: The text.
        settings: ``EvaluationSettings`` as given.
        environment: Versions, device, threads and, from the command, its command line.
        notes: What was assumed, cut or left out, one sentence each.
        non_finite: Keys whose value was "nan", "inf" or "-inf", such as
            {"models.1.quality.perplexity": "nan"}.
    """

    format_version: int
    models: list[ModelResult]
    hidden_states: HiddenResult | None
    generations: list[Generation]
    generation_settings: dict[str, Any]
    own_text: OwnTextResult | None
    data: DataResult
    settings: dict[str, Any]
    environment: dict[str, Any]
    notes: list[str]
    non_finite: dict[str, str]


def find_non_finite(value: object, path: str = "") -> dict[str, str]:
    """Return the place of every NaN and infinity in nested lists and dictionaries.

    Example:
        >>> find_non_finite({"a": [1.0, float("nan")]})
        {'a.1': 'nan'}
    """
    if isinstance(value, float):
        return {} if math.isfinite(value) else {path: str(value)}
    children: list[tuple[object, object]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list | tuple):
        children = list(enumerate(value))
    found: dict[str, str] = {}
    for key, child in children:
        found.update(find_non_finite(child, f"{path}.{key}" if path else str(key)))
    return found


def without_non_finite(value: object) -> object:
    """Return a copy with every NaN and infinity replaced by None, as JSON needs it.

    Example:
        >>> without_non_finite({"a": [1.0, float("inf")]})
        {'a': [1.0, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_non_finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(child) for child in value]
    return value


def with_non_finite(content: dict[str, Any]) -> dict[str, Any]:
    """Return what ``results.json`` holds with NaN and infinities at the places it lists."""
    whole: dict[str, Any] = copy.deepcopy(content)
    for path, value in whole["non_finite"].items():
        *parents, last = path.split(".")
        place: Any = whole
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place[name]
        place[int(last) if isinstance(place, list) else last] = float(value)
    return whole
