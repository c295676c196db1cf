"""Generation: the same settings for every model, and nothing left behind."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from cleangpt.generation import (
    GenerationSettings,
    encode_prompt,
    fit_prompt,
    generate_ids,
)


@pytest.fixture
def teacher() -> Any:
    from tests.evaluation_samples import teacher

    return teacher()


@pytest.fixture
def tokenizer() -> Any:
    from tests.evaluation_samples import byte_tokenizer

    return byte_tokenizer()


def test_greedy_takes_the_most_likely_token(teacher: Any) -> None:
    prompt = [1, 2, 3]
    new = generate_ids(teacher, prompt, GenerationSettings(max_new_tokens=5))
    ids = list(prompt)
    for _ in range(5):
        ids.append(int(teacher(torch.tensor([ids])).logits[0, -1].argmax()))
    assert new == ids[3:]


def test_sampling_depends_on_the_seed_only(teacher: Any) -> None:
    def sample(seed: int) -> list[int]:
        torch.manual_seed(torch.initial_seed() + 1)
        settings = GenerationSettings(do_sample=True, temperature=3.0, seed=seed)
        return generate_ids(teacher, [1, 2], settings, context_length=32)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_the_global_random_state_is_untouched(teacher: Any) -> None:
    before = torch.get_rng_state()
    generate_ids(teacher, [1], GenerationSettings(max_new_tokens=3, do_sample=True))
    assert torch.equal(before, torch.get_rng_state())


def test_a_models_own_defaults_are_set_aside_and_restored(teacher: Any) -> None:
    settings = GenerationSettings(max_new_tokens=8)
    plain = generate_ids(teacher, [1, 2], settings)
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=50.0, max_length=4)
    teacher.generation_config = own
    assert generate_ids(teacher, [1, 2], settings) == plain
    assert teacher.generation_config is own


def test_the_end_token_ends_a_text(teacher: Any) -> None:
    first = generate_ids(teacher, [1, 2], GenerationSettings(max_new_tokens=1))[0]
    settings = GenerationSettings(max_new_tokens=6)
    assert generate_ids(teacher, [1, 2], settings, eos_token_id=first) == [first]


@pytest.mark.parametrize(
    ("length", "context", "new", "kept"),
    [(10, 8, 3, 5), (10, None, 3, 10), (2, 8, 3, 2), (10, 4, 9, 1), (0, 4, 1, 0)],
)
def test_prompts_are_cut_on_the_left(length: int, context: int | None, new: int, kept: int) -> None:
    prompt = list(range(length))
    assert fit_prompt(prompt, context, new) == prompt[length - kept :]


def test_a_long_prompt_and_many_tokens_stay_within_the_context(
    teacher: Any, tokenizer: Any
) -> None:
    settings = GenerationSettings(max_new_tokens=500)
    prompt = fit_prompt(encode_prompt(tokenizer, "x" * 200), 32, settings.max_new_tokens)
    assert len(generate_ids(teacher, prompt, settings, context_length=32)) == 31


def test_an_empty_prompt_starts_from_the_end_token(teacher: Any, tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, "") == [256]
    assert len(generate_ids(teacher, [256], GenerationSettings(max_new_tokens=4))) == 4


def test_a_full_context_gives_nothing(teacher: Any) -> None:
    assert generate_ids(teacher, [1] * 32, GenerationSettings(), context_length=32) == []


@pytest.mark.parametrize("kind", ["Vanilla", "Factored", "SASP"])
def test_students_generate(kind: str, tokenizer: Any) -> None:
    from tests.evaluation_samples import student

    prompt = encode_prompt(tokenizer, "ab")
    settings = GenerationSettings(max_new_tokens=4)
    assert len(generate_ids(student(kind), prompt, settings, context_length=32)) == 4
