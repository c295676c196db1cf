"""``evaluate``: the teacher against itself, settings that act, and refusals."""

import math
from typing import Any

import pytest
import torch

from cleangpt.errors import InputError, UsageError
from distillation.evaluation import evaluate
from distillation.evaluation.results import (
    EvaluationResult,
    EvaluationSettings,
    find_non_finite,
    without_non_finite,
)


@pytest.fixture
def samples() -> Any:
    from tests import evaluation_samples

    return evaluation_samples


def test_the_teacher_as_its_own_student(samples: Any) -> None:
    model = samples.teacher()
    settings = samples.fast_settings(num_prompts=2, max_new_tokens=5)
    result = evaluate(model, model, samples.byte_tokenizer(), samples.PROSE, settings=settings)
    quality = result["models"][1]["quality"]
    assert quality["kl_nats"] == 0.0
    assert quality["top1_agreement"] == 1.0
    assert quality["perplexity_ratio"] == 1.0
    assert result["hidden_states"] is not None
    assert all(block["relative_error"] == 0.0 for block in result["hidden_states"]["blocks"])
    for item in result["generations"]:
        assert item["continuations"]["teacher"] == item["continuations"]["student"]


def test_every_token_of_the_text_is_scored(samples: Any) -> None:
    result = samples.evaluated(seq_len=16, stride=5)
    num_bytes = sum(len(text.encode()) for text in samples.PROSE)
    assert result["data"]["num_bytes"] == num_bytes
    assert result["data"]["num_tokens"] == num_bytes + len(samples.PROSE) - 1  # ends between
    quality = result["models"][0]["quality"]
    assert quality["num_tokens"] == result["data"]["num_tokens"] - 1
    nats = quality["loss_nats"] * quality["num_tokens"]
    assert quality["bits_per_byte"] == pytest.approx(nats / math.log(2) / (num_bytes - 1))


def test_batch_size_and_workers_change_no_result(samples: Any) -> None:
    one, other = samples.evaluated(batch_size=1), samples.evaluated(batch_size=7, num_workers=1)
    for a, b in zip(one["models"], other["models"], strict=True):
        assert a["quality"] == pytest.approx(b["quality"], rel=1e-5)


def test_more_context_is_used(samples: Any) -> None:
    short, long = samples.evaluated(seq_len=4), samples.evaluated(seq_len=32)
    assert short["data"]["seq_len"] == 4
    assert short["models"][0]["quality"]["loss_nats"] != long["models"][0]["quality"]["loss_nats"]


def test_limits_are_kept_and_said(samples: Any) -> None:
    result = samples.evaluated(max_tokens=50, max_hidden_tokens=33, seq_len=1000)
    assert result["models"][0]["quality"]["num_tokens"] == 50
    assert result["hidden_states"]["num_positions"] <= 33
    notes = " ".join(result["notes"])
    for words in ("first 50", "first 33", "from 1000 to 32"):
        assert words in notes


def test_models_are_left_as_they_were(samples: Any) -> None:
    student, teacher = samples.student(dropout=0.5).train(), samples.teacher()
    before = torch.get_rng_state()
    evaluate(
        student, teacher, samples.byte_tokenizer(), samples.PROSE, settings=samples.fast_settings()
    )
    assert student.training
    assert not teacher.training
    assert torch.equal(before, torch.get_rng_state())


def test_baselines_have_rows_of_their_own(samples: Any) -> None:
    result = evaluate(
        samples.student(),
        samples.teacher(),
        samples.byte_tokenizer(),
        samples.PROSE,
        baselines={"student": samples.student(seed=9), "tied": samples.student("SASP")},
        settings=samples.fast_settings(num_prompts=1, max_new_tokens=3),
    )
    assert [model["name"] for model in result["models"]] == [
        "teacher", "student", "student (2)", "tied",
    ]  # fmt: skip
    assert [model["role"] for model in result["models"]][2:] == ["baseline", "baseline"]
    assert set(result["generations"][0]["continuations"]) == {
        model["name"] for model in result["models"]
    }


def test_sizes_count_what_is_stored_once(samples: Any) -> None:
    from tests.builders import WIDTH

    result = samples.evaluated()
    model = samples.teacher()
    size = result["models"][0]["size"]
    assert size["parameters"] == sum(p.numel() for p in model.parameters())
    assert size["embedding_parameters"] == (samples.VOCAB + 32) * WIDTH
    assert size["size_bytes"] == 4 * size["parameters"]


def test_speed_is_measured_for_all(samples: Any) -> None:
    result = samples.evaluated(speed_seconds=0.01, seq_len=16)
    for model in result["models"]:
        assert model["speed"]["repeats"] >= 3
        assert model["speed"]["forward_tokens_per_second"] > 0
        assert model["speed"]["decode_tokens_per_second"] > 0


def test_a_broken_student_is_reported_as_such(samples: Any) -> None:
    student = samples.student()
    with torch.no_grad():
        student.wte.weight.fill_(float("nan"))
    result = evaluate(
        student,
        samples.teacher(),
        samples.byte_tokenizer(),
        samples.PROSE,
        settings=samples.fast_settings(),
    )
    assert math.isnan(result["models"][1]["quality"]["perplexity"])
    assert result["non_finite"]["models.1.quality.perplexity"] == "nan"
    assert "models.0.quality.perplexity" not in result["non_finite"]
    assert find_non_finite(without_non_finite(result)) == {}


def test_vocabularies_of_unequal_size_share_their_rows(samples: Any) -> None:
    result = evaluate(
        samples.student(vocab_size=300),
        samples.teacher(),
        samples.byte_tokenizer(),
        samples.PROSE,
        settings=samples.fast_settings(),
    )
    assert any("300 vocabulary rows" in note for note in result["notes"])


def test_a_token_the_student_lacks_is_refused(samples: Any) -> None:
    with pytest.raises(InputError, match="vocabulary of 50"):
        evaluate(
            samples.student(vocab_size=50),
            samples.teacher(),
            samples.byte_tokenizer(),
            samples.PROSE,
        )


@pytest.mark.parametrize("texts", [[], [""], ["x"], "one string"])
def test_too_little_text_is_refused(samples: Any, texts: Any) -> None:
    with pytest.raises(InputError):
        evaluate(samples.student(), samples.teacher(), samples.byte_tokenizer(), texts)


def test_a_stride_longer_than_the_context_is_refused(samples: Any) -> None:
    with pytest.raises(UsageError, match="stride 40"):
        samples.evaluated(seq_len=16, stride=40)


def test_prompts_of_the_user_are_used_and_cut_to_the_context(samples: Any) -> None:
    result = samples.evaluated(prompts=("", "y" * 100), max_new_tokens=10)
    assert len(result["generations"]) == 4  # two prompts, greedy and sampled
    assert result["generations"][2]["prompt"] == "y" * 22
    assert result["generation_settings"]["context_length"] == 32


def test_the_documented_keys_are_the_keys(samples: Any) -> None:
    result = samples.evaluated()
    assert set(result) == set(EvaluationResult.__annotations__)
    assert set(result["settings"]) == set(EvaluationSettings.__dataclass_fields__)
    assert EvaluationResult.__doc__ is not None
    for key in EvaluationResult.__annotations__:
        assert key in EvaluationResult.__doc__
