"""Evaluate a student against its teacher: one function that calls the measurements in order.

It takes models, a tokenizer and texts, and returns numbers. It reads and writes no file:
``evaluate_distilled_model.py`` loads and ``report.py`` writes.
"""

import logging
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
import transformers
from torch import nn

from cleangpt.blocks import BlockStack
from cleangpt.data.text_sources import texts_fingerprint
from cleangpt.data.windows import pack_documents
from cleangpt.errors import InputError, UsageError
from cleangpt.generation import GenerationSettings
from cleangpt.runtime.module_state import preserved_modes
from distillation.evaluation.hidden_comparison import compare_hidden_states
from distillation.evaluation.metrics import quality_from_sums, score_models
from distillation.evaluation.own_text import measure_own_text
from distillation.evaluation.prompts import compare_generations, cut_prompts
from distillation.evaluation.results import (
    FORMAT_VERSION,
    DataResult,
    EvaluationResult,
    EvaluationSettings,
    Generation,
    HiddenResult,
    ModelResult,
    SpeedResult,
    find_non_finite,
)
from distillation.evaluation.scoring_windows import WindowBatch, plan_windows, window_batches
from distillation.evaluation.speed import measure_size, measure_speed
from distillation.evaluation.tables import ShownEvaluation
from stitching_layers import StitchingLayers

logger = logging.getLogger(__name__)

DEFAULT_MAX_SEQ_LEN = 1024
MAX_LOGITS_PER_BATCH = 2**27  # half a gigabyte of fp32 per model
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class _Entry:
    """A model of the comparison."""

    name: str
    role: Literal["teacher", "student", "baseline"]
    stack: BlockStack


@dataclass(frozen=True)
class _Tokens:
    """The text as one stream of ids; ``scored_bytes`` leaves out the first, unscored, token."""

    ids: list[int]
    num_documents: int
    num_bytes: int
    scored_bytes: int


def evaluate(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    stitches: StitchingLayers | None = None,
    layer_map: Sequence[int] | None = None,
    baselines: Mapping[str, nn.Module] | None = None,
    settings: EvaluationSettings | None = None,
    student_name: str = "student",
    teacher_name: str = "teacher",
) -> EvaluationResult:
    """Return how the student compares with its teacher on the texts.

    All models see the same windows of the same tokens. They are run in eval mode, on the device
    they are on, and are left as they were.

    Args:
        student: A distilled student, or any causal LM of ``transformers``.
        teacher: The model it was distilled from.
        tokenizer: The tokenizer of both.
        texts: Documents to evaluate on; end-of-text is put between them.
        stitches: The run's stitching layers; None fits them or, at equal widths, needs none.
        layer_map: Teacher block of each student block; None takes it from ``stitches``, or spreads
            the student's blocks evenly.
        baselines: More models for the same table, such as the student before distillation.
        settings: How to measure; None takes the defaults.
        student_name: Name of the student in tables.
        teacher_name: Name of the teacher in tables.

    Raises:
        InputError: If the texts are too short, or hold tokens that a model does not know.
        UsageError: If a setting cannot work.

    Example:
        >>> result = evaluate(student, teacher, tokenizer, texts)  # doctest: +SKIP
        >>> result["models"][1]["quality"]["perplexity"]  # doctest: +SKIP
        31.7
    """
    settings = settings or EvaluationSettings()
    entries = _entries(teacher_name, teacher, student_name, student, baselines or {})
    models = [entry.stack.model for entry in entries]
    with preserved_modes(*models):
        for model in models:
            model.eval()
        return _evaluate(entries, tokenizer, texts, settings, stitches, layer_map)


def _evaluate(
    entries: Sequence[_Entry],
    tokenizer: Any,
    texts: Sequence[str],
    settings: EvaluationSettings,
    stitches: StitchingLayers | None,
    layer_map: Sequence[int] | None,
) -> EvaluationResult:
    """Every measurement in order, with the models in eval mode."""
    notes: list[str] = []
    tokens = _tokenize(tokenizer, texts, settings.max_tokens, notes)
    _check_vocabularies(entries, tokens.ids, notes)
    seq_len, stride = _window_sizes(entries, settings, notes)
    data = _data_result(tokens, texts, seq_len, stride)
    rows = _score(entries, tokens, data, settings)
    hidden = _compare_hidden(entries, tokens.ids, data, settings, stitches, layer_map, notes)
    prompts = _prompts(texts, settings)
    writers = _writers(entries, rows, notes) if prompts else {}
    generations, generation_settings = _generate(writers, tokenizer, prompts, settings)
    own_text = None
    if writers:
        own_text = measure_own_text(
            writers, entries[0].stack, tokens.ids, seq_len=seq_len, seed=settings.seed
        )
    result = EvaluationResult(
        format_version=FORMAT_VERSION,
        models=rows,
        hidden_states=hidden,
        generations=generations,
        generation_settings=generation_settings,
        own_text=own_text,
        data=data,
        settings=asdict(settings),
        environment=_environment(entries),
        notes=notes,
        non_finite={},
    )
    result["non_finite"] = find_non_finite(result)
    return cast("EvaluationResult", ShownEvaluation(result))


def _entries(
    teacher_name: str,
    teacher: nn.Module,
    student_name: str,
    student: nn.Module,
    baselines: Mapping[str, nn.Module],
) -> list[_Entry]:
    """Teacher, student, baselines, each under a name of its own."""
    entries = [_Entry(teacher_name, "teacher", BlockStack(teacher))]
    others = [(student_name, "student", student)]
    others += [(name, "baseline", model) for name, model in baselines.items()]
    for name, role, model in others:
        taken = {entry.name for entry in entries}
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name} ({number})", number + 1
        entries.append(
            _Entry(unique, "student" if role == "student" else "baseline", BlockStack(model))
        )
    return entries


def _tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int, notes: list[str]) -> _Tokens:
    """The stream training packs too, at most ``max_tokens`` of it scored."""
    if isinstance(texts, str):
        raise InputError(
            "texts is one string; its characters would become the documents.",
            "Pass a list of documents, for example evaluate(..., texts=[text]).",
        )
    stream, starts = pack_documents(texts, tokenizer)
    ids: list[int] = stream.tolist()
    if len(ids) < 2:
        raise InputError(
            f"The evaluation text has {len(ids)} tokens; at least 2 are needed.",
            "Name a longer text with --dataset_name, or raise --max_samples.",
        )
    num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts if text)
    if max_tokens and len(ids) > max_tokens + 1:
        notes.append(f"Scored the first {max_tokens:,} of {len(ids) - 1:,} tokens (max_tokens).")
        ids = ids[: max_tokens + 1]
        num_bytes = _num_bytes(tokenizer, ids)
    return _Tokens(ids, len(starts), num_bytes, max(1, num_bytes - _num_bytes(tokenizer, ids[:1])))


def _num_bytes(tokenizer: Any, ids: list[int]) -> int:
    """UTF-8 bytes of the text of these tokens; special tokens have none."""
    return len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode("utf-8", "replace"))


def _check_vocabularies(entries: Sequence[_Entry], ids: Sequence[int], notes: list[str]) -> None:
    """Refuse tokens a model does not have; say which rows are compared if sizes differ."""
    largest = max(ids)
    teacher = entries[0]
    for entry in entries:
        size = entry.stack.vocab_size
        if largest >= size:
            raise InputError(
                f"The text holds token {largest}, but {entry.name} has a vocabulary of {size}.",
                "Evaluate with the teacher and tokenizer the student was distilled from "
                "(--teacher_model_name).",
            )
        if size != teacher.stack.vocab_size:
            shared = min(size, teacher.stack.vocab_size)
            message = (
                f"{entry.name} has {size} vocabulary rows and {teacher.name} "
                f"{teacher.stack.vocab_size}: KL and agreement use the first {shared}."
            )
            logger.warning(message)
            notes.append(message)


def _window_sizes(
    entries: Sequence[_Entry], settings: EvaluationSettings, notes: list[str]
) -> tuple[int, int]:
    """Context length and stride, the same for every model."""
    lengths = [e.stack.context_length for e in entries if e.stack.context_length is not None]
    limit = min(lengths) if lengths else None
    seq_len = settings.seq_len or min(limit or DEFAULT_MAX_SEQ_LEN, DEFAULT_MAX_SEQ_LEN)
    if limit is not None and seq_len > limit:
        message = f"Context length cut from {seq_len} to {limit}, the most all models can read."
        logger.warning(message)
        notes.append(message)
        seq_len = limit
    stride = settings.stride or max(1, seq_len // 2)
    if stride > seq_len:
        raise UsageError(
            f"--stride {stride} exceeds the context length {seq_len}; tokens would be left out.",
            f"Use --stride {seq_len} or less.",
        )
    return seq_len, stride


def _data_result(tokens: _Tokens, texts: Sequence[str], seq_len: int, stride: int) -> DataResult:
    return DataResult(
        name="",
        split="",
        fingerprint=texts_fingerprint(texts),
        num_documents=tokens.num_documents,
        num_tokens=len(tokens.ids),
        num_bytes=tokens.num_bytes,
        seq_len=seq_len,
        stride=stride,
        num_windows=len(plan_windows(len(tokens.ids), seq_len, stride)),
    )


def _batch_size(entries: Sequence[_Entry], settings: EvaluationSettings, seq_len: int) -> int:
    """The batch size, or fewer windows where logits would not fit; results stay the same."""
    vocab = max(entry.stack.vocab_size for entry in entries)
    return max(1, min(settings.batch_size, MAX_LOGITS_PER_BATCH // (seq_len * vocab)))


def _score(
    entries: Sequence[_Entry], tokens: _Tokens, data: DataResult, settings: EvaluationSettings
) -> list[ModelResult]:
    """Size, quality and speed of every model."""
    logger.info("Scoring %d tokens with %d models", len(tokens.ids) - 1, len(entries))
    batches = window_batches(
        tokens.ids,
        plan_windows(len(tokens.ids), data["seq_len"], data["stride"]),
        _batch_size(entries, settings, data["seq_len"]),
        settings.num_workers,
    )
    stacks = [entry.stack for entry in entries]
    sums = score_models(stacks, stacks[0], _with_progress(batches, data["num_windows"]))
    speeds: Sequence[SpeedResult | None] = [None] * len(entries)
    if settings.speed_seconds > 0:
        speeds = measure_speed(stacks, tokens.ids, data["seq_len"], settings.speed_seconds)
    return [
        ModelResult(
            name=entry.name,
            role=entry.role,
            source=type(entry.stack.model).__name__,
            size=measure_size(entry.stack),
            quality=quality_from_sums(own, sums[0], tokens.scored_bytes),
            speed=speed,
        )
        for entry, own, speed in zip(entries, sums, speeds, strict=True)
    ]


def _with_progress(batches: Iterator[WindowBatch], num_windows: int) -> Iterator[WindowBatch]:
    """The same batches; a line in the log every ten seconds."""
    done, said_at = 0, time.monotonic()
    for batch in batches:
        yield batch
        done += len(batch.input_ids)
        if time.monotonic() - said_at > SECONDS_BETWEEN_LINES:
            logger.info("Scored %d of %d windows", done, num_windows)
            said_at = time.monotonic()


def _compare_hidden(
    entries: Sequence[_Entry],
    ids: list[int],
    data: DataResult,
    settings: EvaluationSettings,
    stitches: StitchingLayers | None,
    layer_map: Sequence[int] | None,
    notes: list[str],
) -> HiddenResult | None:
    """The student's blocks, on windows that do not overlap."""
    limit = settings.max_hidden_tokens
    if limit and len(ids) > limit + 1:
        notes.append(f"Hidden states compared on the first {limit:,} tokens (max_hidden_tokens).")
        ids = ids[: limit + 1]
    return compare_hidden_states(
        entries[1].stack,
        entries[0].stack,
        ids,
        seq_len=data["seq_len"],
        batch_size=settings.batch_size,
        stitches=stitches,
        layer_map=layer_map,
        notes=notes,
    )


def _writers(
    entries: Sequence[_Entry], rows: Sequence[ModelResult], notes: list[str]
) -> dict[str, BlockStack]:
    """The models that can write, by name; the others are noted."""
    writers = {}
    for entry, row in zip(entries, rows, strict=True):
        problem = ""
        if not hasattr(entry.stack.model, "generate"):
            problem = "has no generate()"
        elif not math.isfinite(row["quality"]["loss_nats"]):
            problem = "gives NaN or infinity"
        if problem:
            notes.append(f"{entry.name} {problem} and is left out of the generations.")
        else:
            writers[entry.name] = entry.stack
    return writers


def _prompts(texts: Sequence[str], settings: EvaluationSettings) -> list[Generation]:
    """The user's prompts, or those cut from the text; none unless asked for."""
    return [
        Generation(mode="greedy", prompt=prompt, reference="", continuations={})
        for prompt in settings.prompts
    ] or cut_prompts(texts, settings.num_prompts, settings.max_new_tokens)


def _generate(
    writers: Mapping[str, BlockStack],
    tokenizer: Any,
    prompts: Sequence[Generation],
    settings: EvaluationSettings,
) -> tuple[list[Generation], dict[str, Any]]:
    """Continuations of every model that can write."""
    if not prompts:
        return [], {}
    generation_settings = GenerationSettings(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    return compare_generations(writers, tokenizer, prompts, generation_settings)


def _environment(entries: Sequence[_Entry]) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": str(entries[1].stack.device),
        "dtype": str(next(iter(entries[1].stack.model.parameters())).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
