"""Prompts for the generation comparison, and the continuations of every model.

Every model gets the same token ids, settings and seed: a prompt is cut on the left once, to what
the shortest context holds.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError
from cleangpt.generation import GenerationSettings, encode_prompt, fit_prompt, generate_ids
from distillation.evaluation.results import Generation

PROMPT_WORDS = 20
MAX_PROMPT_CHARACTERS = 400
CHARACTERS_PER_TOKEN = 4
_WORDS = re.compile(rf"\S+(?:\s+\S+){{0,{PROMPT_WORDS - 1}}}")


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a text file, one per line; blank lines are skipped.

    Raises:
        InputError: If the file is missing, is not UTF-8, or has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(
            f"--prompts_file {path} cannot be read: {error.strerror}.",
            "Name a text file with one prompt per line.",
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompts_file {path} is not UTF-8 (byte {error.start}).",
            "Save the file as UTF-8 text.",
        ) from error
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise InputError(f"--prompts_file {path} holds no prompt.", "Write one prompt per line.")
    return prompts


def cut_prompts(texts: Sequence[str], num_prompts: int, max_new_tokens: int) -> list[Generation]:
    """Return prompts spread evenly over the texts, each with what the text goes on with.

    A prompt starts at a line or word boundary and has at most 20 words. There are fewer than asked
    for if the texts are too short or repeat themselves.
    """
    total = sum(len(text) for text in texts)
    prompts: list[Generation] = []
    for index in range(num_prompts):
        excerpt = _excerpt_at(texts, total * index // num_prompts)
        match = _WORDS.match(excerpt)
        if match is None:
            continue
        prompt = match.group()[:MAX_PROMPT_CHARACTERS]
        rest = excerpt[len(prompt) :][: max_new_tokens * CHARACTERS_PER_TOKEN]
        if rest.strip() and all(prompt != other["prompt"] for other in prompts):
            prompts.append(
                Generation(mode="greedy", prompt=prompt, reference=rest, continuations={})
            )
    return prompts


def _excerpt_at(texts: Sequence[str], position: int) -> str:
    """The text from a line or word boundary near a character position, within one document.

    Too near the end of a document for a prompt and what follows it, the document's start is taken.
    """
    for text in texts:
        if position < len(text):
            near = text[position : position + 4000]
            found = (re.search(pattern, near) for pattern in (r"\n\s*", r"\s+"))
            cuts = [near[boundary.end() :] for boundary in found if boundary]
            long_enough = (cut for cut in cuts if len(cut.split()) > 1.5 * PROMPT_WORDS)
            return next(long_enough, text[:4000]).lstrip()
        position -= len(text)
    return ""


def compare_generations(
    stacks: Mapping[str, BlockStack],
    tokenizer: Any,
    prompts: Sequence[Generation],
    settings: GenerationSettings,
) -> tuple[list[Generation], dict[str, Any]]:
    """Return greedy and sampled continuations of every model, and the settings they share."""
    limits = [s.context_length for s in stacks.values() if s.context_length is not None]
    context_length = min(limits) if limits else None
    results: list[Generation] = []
    for index, item in enumerate(prompts):
        whole = encode_prompt(tokenizer, item["prompt"])
        ids = fit_prompt(whole, context_length, settings.max_new_tokens)
        prompt = item["prompt"] if len(ids) == len(whole) else str(tokenizer.decode(ids))
        for mode in ("greedy", "sampled"):
            own = replace(settings, do_sample=mode == "sampled", seed=settings.seed + index)
            continuations = {
                name: _continue(stack, tokenizer, ids, own, context_length)
                for name, stack in stacks.items()
            }
            results.append(
                Generation(
                    mode="sampled" if own.do_sample else "greedy",
                    prompt=prompt,
                    reference=item["reference"],
                    continuations=continuations,
                )
            )
    shared = {key: value for key, value in asdict(settings).items() if key != "do_sample"}
    return results, {**shared, "modes": ["greedy", "sampled"], "context_length": context_length}


def _continue(
    stack: BlockStack,
    tokenizer: Any,
    ids: Sequence[int],
    settings: GenerationSettings,
    context_length: int | None,
) -> str:
    new_ids = generate_ids(
        stack.model,
        ids,
        settings,
        context_length=context_length,
        eos_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(new_ids, skip_special_tokens=True))
