"""Results show themselves as tables and curves, and stay what they are."""

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, strategies as st

from tests.faults.small_runs import TRAINING, small_trainer

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=y>\x1b[31m'
ANY_LOSS = st.floats(-1e100, 1e100)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    trainer = small_trainer(tmp_path_factory.mktemp("displays"))
    return trainer, trainer.train(**TRAINING)


def parsed(page: str) -> ElementTree.Element:
    """The tree of a fragment; fails where a tag is open or a text is not escaped."""
    return ElementTree.fromstring(f"<div>{page}</div>")


def test_results_are_the_dictionary_they_were(finished: tuple[Any, Any]) -> None:
    _, results = finished
    plain = dict(results)
    assert isinstance(results, dict)
    assert {"backbone_losses", "head_loss"} <= set(results)
    assert json.loads(json.dumps(results)) == json.loads(json.dumps(plain))
    for copied in (pickle.loads(pickle.dumps(results)), copy.deepcopy(results)):
        assert copied == plain
        assert copied._repr_html_() == results._repr_html_()


def test_terminal_and_notebook_show_every_stage(finished: tuple[Any, Any]) -> None:
    _, results = finished
    page = parsed(results._repr_html_())
    stages = [row["stage"] for row in results["blocks"]] + ["lm-head", "polish"]
    assert [row[0].text for row in page.iter("tr")][1:] == stages
    assert all(stage in repr(results) for stage in stages)
    assert "keys: backbone_losses" in repr(results)
    lines = [e for e in page.iter() if e.tag.endswith("polyline")]
    assert len(lines) == len(stages)
    assert all(len(line.attrib["points"].split()) > 3 for line in lines), "steps, not only the ends"


def test_a_finished_run_that_is_resumed_shows_the_same(finished: tuple[Any, Any]) -> None:
    trainer, results = finished
    again = small_trainer(trainer.run.path.parent).train(**TRAINING)
    assert again._repr_html_() == results._repr_html_()


STEP = b'{"event": "step", "stage": "block-00", "step": %b, "loss": %b}\n'
DAMAGES = [
    b"",
    b"\xff\xfe",
    b"{}\n[1]\n3\n",
    b"[" * 100_000,
    STEP % (b"1" + b"0" * 400, b"1"),
    STEP % (b"1", b"-1" + b"0" * 400),
    None,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_the_runs_file_the_table_remains(
    damage: bytes | None, finished: tuple[Any, Any], tmp_path: Path
) -> None:
    _, results = finished
    moved = copy.copy(results)
    moved["output_dir"] = str(tmp_path)
    if damage is not None:
        (tmp_path / "metrics.jsonl").write_bytes(damage)
    assert len(list(parsed(moved._repr_html_()).iter("tr"))) == 5


def test_foreign_names_are_escaped(finished: tuple[Any, Any]) -> None:
    from distillation.displays import loss_curve

    _, results = finished
    hostile = copy.deepcopy(results)
    hostile["blocks"][0]["stage"] = HOSTILE
    hostile["student_path"] = HOSTILE
    shown = hostile._repr_html_() + loss_curve({HOSTILE: [(1.0, 1.0)]})
    assert not list(parsed(shown).iter("script"))
    assert not list(parsed(shown).iter("img"))
    assert "\x1b" not in shown + repr(hostile)


@given(st.lists(st.tuples(st.integers(1, 10**6), ANY_LOSS), min_size=1, max_size=5))
def test_any_losses_are_inside_the_picture(points: list[tuple[int, float]]) -> None:
    from distillation.displays import HEIGHT, WIDTH, loss_curve

    picture = loss_curve({"one": [(float(step), loss) for step, loss in points]})
    for across, down in re.findall(r"(\S+),(\S+)", re.findall(r'points="([^"]+)"', picture)[0]):
        assert 0 <= float(across) <= WIDTH
        assert 0 <= float(down) <= HEIGHT


def test_no_point_no_picture() -> None:
    from distillation.displays import loss_curve, thinned

    assert loss_curve({}) == loss_curve({"block-00": []}) == ""
    assert "polyline" in loss_curve({"block-00": [(0.0, 1.0)]})
    many = [(float(i), 1.0) for i in range(1001)]
    assert thinned(many)[0] == many[0]
    assert thinned(many)[-1] == many[-1]
    assert len(thinned(many)) <= 202


def test_trainer_says_what_it_is_and_how_far(finished: tuple[Any, Any], tmp_path: Path) -> None:
    trainer, _ = finished
    said = repr(trainer)
    assert "GPT2LMHeadModel, 3 blocks x 32" in said
    assert "2 blocks x 16" in said
    assert "(done)" in said
    fresh = small_trainer(tmp_path)
    assert "(new)" in repr(fresh)
    fresh.run.path.mkdir()
    (fresh.run.path / "manifest.json").write_text("{")
    assert "damaged" in repr(fresh)


def test_configuration_shows_the_call_that_makes_it() -> None:
    from config_distillation import GPTConfig

    config = GPTConfig(n_layer=2, head_rank=3, model_type="Vanilla")
    assert repr(config) == "GPTConfig(model_type='Vanilla', n_layer=2, head_rank=3)"
    assert eval(repr(config)) == config
    assert repr(GPTConfig()) == "GPTConfig(model_type='SASP')"


def test_evaluation_shows_its_tables() -> None:
    from distillation.evaluation.tables import ShownEvaluation
    from tests.evaluation_samples import evaluated

    result = evaluated()
    result["models"][1]["name"] = HOSTILE
    shown = ShownEvaluation(result)
    assert shown == result
    assert json.loads(json.dumps(shown)) == json.loads(json.dumps(result))
    page = parsed(shown._repr_html_())
    assert len(list(page.iter("table"))) == 2
    assert not list(page.iter("script"))
    assert "perplexity" in repr(shown)
    assert "\x1b" not in repr(shown)
