"""Models on text of their own: against plain forward passes, and where there is nothing to say."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from cleangpt.blocks import BlockStack
from cleangpt.generation import GenerationSettings, continue_rows, generate_ids
from distillation.evaluation import tables
from distillation.evaluation.own_text import measure_own_text, repetition
from distillation.report.page import run_page
from tests.evaluation_samples import VOCAB, evaluated, student, teacher
from tests.report_samples import evaluation_of, write_run

TEXT = torch.randint(0, VOCAB, (200,), generator=torch.Generator().manual_seed(3)).tolist()


def measured(model: Any, **changes: Any) -> Any:
    judge = BlockStack(teacher())
    stacks = {"teacher": judge, "student": BlockStack(model)}
    options = {"ids": TEXT, "seq_len": 32, "seed": 0, **changes}
    return measure_own_text(stacks, judge, options.pop("ids"), **options)


def test_the_text_itself_is_compared_as_by_plain_forward_passes() -> None:
    found, model = measured(student()), student()
    prompt, new = 8, 24
    assert (found["num_windows"], found["prompt_tokens"], found["new_tokens"]) == (6, prompt, new)
    divergences, losses = [], []
    for window in range(6):
        start = window * (len(TEXT) // 6)
        row = torch.tensor([TEXT[start : start + prompt + new]])
        theirs, own = (m(row).logits[0, prompt - 1 : -1] for m in (teacher(), model))
        losses.append(F.cross_entropy(theirs, row[0, prompt:]).item())
        p, q = theirs.softmax(-1), own.softmax(-1)
        divergences.append((p * (p / q).log()).sum(-1).mean().item())
    first, second = found["models"]
    assert second["kl_text_nats"] == pytest.approx(sum(divergences) / 6, rel=1e-4)
    assert found["text_loss_nats"] == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert first["kl_text_nats"] == first["kl_nats"] == 0.0
    quarters = sum(second["kl_text_quarters"]) / 4
    assert second["kl_text_nats"] == pytest.approx(quarters, rel=1e-5)
    assert second["kl_nats"] == pytest.approx(sum(second["kl_quarters"]) / 4, rel=1e-5)
    assert second["kl_nats"] > 0


def test_a_model_that_goes_round_in_circles_is_found_out() -> None:
    model = student()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.final_norm.bias.fill_(1.0)
        model.wte.weight[7] = 100.0  # its head too: it says 7, whatever it reads
    found = measured(model)
    own = found["models"][1]
    assert own["repetition"] == pytest.approx(1 - 1 / 21)  # one 4-gram of 21 in 24 tokens
    row = torch.tensor([TEXT[:8] + [7] * 24])
    expected = F.cross_entropy(teacher()(row).logits[0, 7:-1], row[0, 8:])
    assert measured(model, ids=TEXT[:32])["models"][1]["teacher_loss_nats"] == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_repetition_by_hand() -> None:
    assert repetition(torch.tensor([[1, 2, 3, 4, 5]])) == 0.0
    assert repetition(torch.tensor([[1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6]])) == pytest.approx(
        1 / 3
    )


def test_rows_are_continued_as_each_alone() -> None:
    rows = torch.tensor([TEXT[:5], TEXT[50:55]])
    settings = GenerationSettings(max_new_tokens=6)
    whole = continue_rows(teacher(), rows, settings)
    assert whole[:, :5].equal(rows)
    for row, continued in zip(rows.tolist(), whole[:, 5:].tolist(), strict=True):
        assert continued == generate_ids(teacher(), row, settings)


def test_no_token_is_written_that_the_teacher_does_not_know() -> None:
    model = student(vocab_size=VOCAB + 40)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB:] *= 100.0
    rows = torch.tensor([TEXT[:5], TEXT[50:55]])
    for do_sample in (False, True):
        settings = GenerationSettings(max_new_tokens=20, do_sample=do_sample, top_k=0)
        free = continue_rows(model, rows, settings)
        assert free.max() >= VOCAB
        assert continue_rows(model, rows, settings, never=range(VOCAB, VOCAB + 40)).max() < VOCAB
    assert math.isfinite(measured(model)["models"][1]["kl_nats"])


def test_models_of_other_vocabularies_and_configurations_are_measured() -> None:
    judge = BlockStack(teacher(vocab_size=VOCAB + 40))
    stacks = {"teacher": judge, "student": BlockStack(student())}
    found = measure_own_text(stacks, judge, TEXT, seq_len=32, seed=0)
    assert found is not None
    assert found["models"][1]["kl_nats"] > 0
    # A model for images too keeps the sizes of its text part in a configuration of their own.
    text = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    images = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    images |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    config.image_token_id = config.boi_token_index = config.eoi_token_index = VOCAB - 1
    assert measured(Gemma3ForConditionalGeneration(config).eval())["models"][1]["kl_nats"] > 0


@pytest.mark.parametrize("too_little", [{"seq_len": 3}, {"ids": TEXT[:20]}])
def test_without_room_there_are_no_figures(too_little: dict[str, Any]) -> None:
    assert measured(student(), **too_little) is None


def test_the_seed_decides() -> None:
    first, again, other = (measured(student(), seed=seed)["models"][1] for seed in (0, 0, 1))
    assert first == again
    assert first["kl_nats"] != other["kl_nats"]
    assert first["kl_text_nats"] == other["kl_text_nats"]


def test_an_evaluation_has_it_where_generations_are_asked_for() -> None:
    assert evaluated()["own_text"] is None
    assert tables.own_text_table(evaluated())[1] == []
    result = evaluated(num_prompts=1, max_new_tokens=2)
    names = [row[0] for row in tables.own_text_table(result)[1]]
    assert names == ["the text itself", "teacher", "student"]


def test_a_broken_student_writes_nothing_and_is_named() -> None:
    from distillation.evaluation import evaluate
    from tests import evaluation_samples as samples

    model = student()
    with torch.no_grad():
        model.wte.weight.fill_(float("nan"))
    result = evaluate(
        model,
        teacher(),
        samples.byte_tokenizer(),
        samples.PROSE,
        settings=samples.fast_settings(num_prompts=1, max_new_tokens=2),
    )
    assert any("student gives NaN or infinity" in note for note in result["notes"])
    assert [own["name"] for own in result["own_text"]["models"]] == ["teacher"]
    assert [list(item["continuations"]) for item in result["generations"]] == [["teacher"]] * 2


def test_an_evaluation_shows_text_of_the_models_own_and_an_older_one_has_none(
    tmp_path: Path,
) -> None:
    page = run_page(write_run(tmp_path / "new", evaluation=evaluation_of()))
    assert "3 beginnings of 8 tokens" in page
    assert "62.5 %" in page
    assert "0.0500" in page  # the calibration error
    older = evaluation_of()
    del older["own_text"]
    for model in older["models"]:
        del model["quality"]["calibration_error"]
    page = run_page(write_run(tmp_path / "old", evaluation=older))
    assert "is not what" not in page
    assert "baseline (Vanilla, start)" in page
    assert "beginnings of" not in page
    assert "<th>calibration error" not in page
