"""Continue prompts with any causal LM, the same way for every model.

A comparison of two models says something only if both get the same prompts, settings and seed. A
model's own saved ``generation_config`` (a chat model samples by default, say) is set aside for the
call and put back afterwards. This file knows models and tokenizers, and nothing about distillation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationConfig


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue a prompt.

    Args:
        max_new_tokens: New tokens per prompt, at least 1; fewer if the context is shorter.
        do_sample: False takes the most likely token (greedy), True samples.
        temperature: Softmax temperature when sampling, > 0.
        top_k: Sample among this many tokens; 0 means all.
        top_p: Sample among the most likely tokens that together have this probability.
        seed: Seed of the sampling; a caller with several prompts changes it from one to the next.
    """

    max_new_tokens: int = 40
    do_sample: bool = False
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0


def fit_prompt(
    prompt_ids: Sequence[int], context_length: int | None, max_new_tokens: int
) -> list[int]:
    """Return the end of the prompt that leaves room for the new tokens; at least one token.

    Example:
        >>> fit_prompt([1, 2, 3, 4], context_length=5, max_new_tokens=2)
        [2, 3, 4]
    """
    if context_length is None:
        return list(prompt_ids)
    return list(prompt_ids)[-max(1, context_length - max_new_tokens) :]


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the prompt's ids, with the start token if the tokenizer puts one before a text.

    An empty prompt becomes the token that starts or ends a text.
    """
    bos = tokenizer.bos_token_id
    starts = bos is not None and bos in tokenizer("")["input_ids"][:1]
    ids = [bos] if starts else []
    ids += tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    fallbacks = (bos, tokenizer.eos_token_id, 0)
    return ids or [next(each for each in fallbacks if each is not None)]


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    *,
    context_length: int | None = None,
    eos_token_id: int | None = None,
) -> list[int]:
    """Return the new token ids for one prompt, already fitted to the context.

    Without ``eos_token_id`` nothing ends a text early. The global random state is left as it was.
    """
    device = next(model.parameters()).device
    input_ids = torch.tensor([list(prompt_ids)], dtype=torch.long, device=device)
    room = settings.max_new_tokens
    if context_length is not None:
        room = min(room, context_length - len(prompt_ids))
    if room < 1:
        return []
    config = _generation_config(settings, room, eos_token_id)
    output = _generated(model, input_ids, config, settings.seed)
    return [int(token) for token in output[0, len(prompt_ids) :]]


@torch.no_grad()
def continue_rows(
    model: nn.Module,
    rows: Int[Tensor, "rows prompt"],
    settings: GenerationSettings,
    *,
    never: Sequence[int] = (),
) -> Int[Tensor, "rows whole"]:
    """Return rows of token ids, each continued by exactly ``max_new_tokens``, on the host.

    Args:
        model: Any causal LM that can generate.
        rows: Beginnings of one length; with what follows they fit the model's context.
        settings: How to continue them.
        never: Tokens that are not written.
    """
    config = _generation_config(settings, settings.max_new_tokens, None)
    config.suppress_tokens = list(never) or None
    device = next(model.parameters()).device
    return _generated(model, rows.to(device), config, settings.seed).cpu()


def _generated(model: nn.Module, input_ids: Tensor, config: GenerationConfig, seed: int) -> Tensor:
    """Prompts and what follows; the global random state stays as it is."""
    cuda_devices = [input_ids.device] if input_ids.device.type == "cuda" else []
    with _neutral_defaults(model, config), torch.random.fork_rng(devices=cuda_devices):
        torch.manual_seed(seed)
        output: Tensor = model.generate(  # type: ignore[operator]
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
        )
    return output


def _generation_config(
    settings: GenerationSettings, room: int, eos_token_id: int | None
) -> GenerationConfig:
    """HF's form of the settings; sampling knobs only when sampling, or HF warns."""
    options: dict[str, Any] = {
        "max_new_tokens": room,
        "do_sample": settings.do_sample,
        "num_beams": 1,
        "eos_token_id": eos_token_id,
        "pad_token_id": 0 if eos_token_id is None else eos_token_id,
    }
    if settings.do_sample:
        options["temperature"] = settings.temperature
        options["top_k"] = settings.top_k
        options["top_p"] = settings.top_p
    return GenerationConfig(**options)


@contextmanager
def _neutral_defaults(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Set the model's own generation settings aside: HF fills unset fields from them."""
    holder: Any = model
    own = getattr(holder, "generation_config", None)
    holder.generation_config = config
    try:
        yield
    finally:
        holder.generation_config = own
