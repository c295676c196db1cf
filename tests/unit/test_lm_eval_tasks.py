"""The tasks that are made from the built-in text, and what is asked of them without the harness."""

import importlib.util
import math
from pathlib import Path

import pytest

from cleangpt.cli import run_command
from distillation.evaluation.harness import OUR_NAMES, OUR_TASKS, Perplexities, shared_context
from distillation.evaluation.lm_eval import build_parser, main, table_of
from distillation.evaluation.lm_eval_tasks.builtin_text import CHOICES, cloze_items, documents

TEXT = (
    "The first line of this paragraph tells the reader\nsomething about small dictionaries. "
    "Another sentence follows at once, and it ends with parameters.\n\n"
    "A third one stands alone, long enough to be taken as a question. Too short here.\n\n"
    "Finally, the last paragraph says a little more about ordinary generators."
)


def test_a_question_ends_with_the_words_of_its_sentence() -> None:
    items = cloze_items([TEXT])
    assert len(items) == 4
    whole = " ".join(TEXT.split())
    for item in items:
        right = item["choices"][item["answer"]]
        assert f"{item['beginning']} {right}." in whole
        assert len({word.lower() for word in item["choices"]}) == CHOICES
    assert {item["choices"][item["answer"]] for item in items} == {
        *("dictionaries", "parameters", "question", "generators")
    }


def test_questions_depend_on_nothing_but_the_text() -> None:
    assert cloze_items([TEXT]) == cloze_items(TEXT.split("\n\n")[::-1])


@pytest.mark.slow
def test_the_built_in_text_gives_questions_enough() -> None:
    from cleangpt.builtin.corpus import builtin_texts

    items = cloze_items(builtin_texts("test"))
    assert len(items) > 100
    places = [sum(item["answer"] == place for item in items) for place in range(CHOICES)]
    assert min(places) > len(items) / 8
    assert len(documents()["test"]) == len(builtin_texts("test"))


def test_each_task_has_its_file() -> None:
    assert {path.stem for path in OUR_TASKS.glob("*.yaml")} == set(OUR_NAMES)
    for name in OUR_NAMES:
        assert f"task: {name}\n" in (OUR_TASKS / f"{name}.yaml").read_text()
    assert build_parser().parse_args(["--model_path", "x"]).tasks == ",".join(OUR_NAMES)


def test_the_context_is_one_that_all_read() -> None:
    from tests.builders import tiny_student, tiny_teacher

    models = [tiny_teacher(), tiny_student(block_size=16)]
    assert shared_context(models, None) == 16
    assert shared_context(models, 8) == 8
    assert shared_context(models, 99) == 16


def test_the_table_has_a_column_per_model() -> None:
    scores = {"teacher": {"t": {"acc": 0.5}}, "student": {"t": {"acc": math.nan}}}
    ours = {"teacher": Perplexities(2.0, 2.0, 9), "student": Perplexities(4.0, 3.2, 9)}
    columns, rows = table_of(scores, ours)
    assert columns == ("task and metric", "teacher", "student")
    assert rows[0] == ("t acc", "0.5000", "NaN")
    assert rows[-1] == ("perplexity per token, ours", "2.0000", "3.2000")
    assert ours["student"].relative_difference == pytest.approx(0.25)


def test_a_missing_harness_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed")
    assert run_command(main, ["--model_path", str(tmp_path)]) == 5
    assert "pip install 'cleangpt-distillation[lm-eval]'" in capsys.readouterr().err
