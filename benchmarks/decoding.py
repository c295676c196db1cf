"""Decoding: tokens per second of each student, with its cache, and of the teacher."""

import time
from typing import Any

from benchmarks.cases import Shape, new_student, new_teacher
from benchmarks.report import Section
from benchmarks.spread import ratios, spread
from cleangpt.generation import GenerationSettings, generate_ids

PROMPT, NEW_TOKENS = 16, 64


def measure_decoding(kinds: tuple[str, ...], shape: Shape, repeats: int) -> Section:
    """Greedy continuation of one prompt, float32, the models taking turns."""
    section = Section(
        f"Decoding {NEW_TOKENS} tokens, batch 1, greedy, key-value cache ({shape})",
        ["model", "parameters, millions", "tokens per second", "student / teacher"],
    )
    models = {"teacher": new_teacher(shape)}
    models.update({kind: new_student(kind, shape).eval() for kind in kinds})
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            taken = decode_seconds(model)
            if turn > 0:  # the first turn warms up
                seconds[name].append(taken)
    for name, model in models.items():
        rate = spread(NEW_TOKENS / taken for taken in seconds[name])
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        section.add(name, size, rate, ratios(seconds["teacher"], seconds[name]))
    return section


def decode_seconds(model: Any) -> float:
    """The wall time of one continuation; no end token makes it shorter."""
    started_at = time.perf_counter()
    new = generate_ids(model, list(range(PROMPT)), GenerationSettings(max_new_tokens=NEW_TOKENS))
    taken = time.perf_counter() - started_at
    if len(new) != NEW_TOKENS:
        raise AssertionError(f"{len(new)} tokens were generated, and not {NEW_TOKENS}.")
    return taken
