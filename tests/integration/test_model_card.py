"""The card of a finished student: real figures, escaped, and refreshed by an evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cleangpt.cli import run_command
from cleangpt.integrity import check_sums
from cleangpt.manifest import read_manifest
from distillation.evaluation.card_figures import refresh_card
from distillation.evaluation.evaluate_distilled_model import main
from distillation.model_card import MARK, Figures, model_card, write_card
from tests.evaluation_samples import evaluated
from tests.integration.test_hostile_text import HOSTILE, Tags, assert_plain


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its teacher and a text."""
    from distillation import DistillationTrainer
    from tests.builders import batches
    from tests.evaluation_samples import PROSE, byte_tokenizer, save_teacher, student, teacher

    root = tmp_path_factory.mktemp("card")
    save_teacher(root / "teacher")
    trainer = DistillationTrainer(
        teacher(), student(), byte_tokenizer(), batches(), output_dir=root / "run"
    )
    trainer.train(1, 1e-2)
    (root / "test.txt").write_text("\n\n\n".join(PROSE))
    return root


def card_of(run: Path) -> str:
    return (run / "final" / "README.md").read_text(encoding="utf-8")


def test_a_run_leaves_a_card_with_its_figures(made: Path) -> None:
    card, manifest = card_of(made / "run"), read_manifest(made / "run")
    assert manifest is not None
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert "vanilla" in data.tags
    tokens = sum(row["tokens"] for row in manifest["stages"])
    parameters = manifest["saved_student"]["parameters"]
    # The head was untied for its training.
    assert parameters == manifest["student"]["parameters"] + 258 * 16
    for said in (f"{parameters:,} stored", f"{tokens:,} training tokens", "3 stages", "0 <- 1"):
        assert said in card, said
    # Of a list of batches nothing more is known.
    assert "4 batches of - windows of - tokens; fingerprint (SHA-256) not recorded" in card
    assert '"lr_per_block": 0.01' in card
    assert "Not evaluated yet" in card
    assert "trust_remote_code=True" in card
    check_sums(made / "run" / "final")
    assert "README.md" not in (made / "run" / "final" / "SHA256SUMS").read_text()


def test_an_evaluation_refreshes_it_unless_it_is_the_users(made: Path) -> None:
    run, result = made / "run", evaluated()
    for source in ("start", "other.pt"):
        assert refresh_card(result, str(run / source), run) is None
    assert "Not evaluated yet" in card_of(run)
    assert refresh_card(result, str(run / "final"), run) == run / "final" / "README.md"
    quality = result["models"][1]["quality"]
    card = card_of(run)
    assert "Not evaluated yet" not in card
    (found,) = ModelCard(card).data.eval_results
    assert found.metric_value == pytest.approx(quality["perplexity"], abs=1e-4)
    assert f"{quality['perplexity']:,.2f}" in card
    check_sums(run / "final")
    own = card.replace(MARK, "My own words.")
    (run / "final" / "README.md").write_text(own)
    assert refresh_card(result, str(run / "final"), run) is None
    assert card_of(run) == own
    (run / "final" / "README.md").write_text(card)


@pytest.mark.slow
def test_the_evaluation_command_refreshes_it(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_path", str(made / "run"), "--teacher_model_name", str(made / "teacher")]
    flags += ["--dataset_name", str(made / "test.txt"), "--speed_seconds", "0"]
    flags += ["--device", "cpu", "--output_dir", str(made / "report")]
    assert run_command(main, flags) == 0
    assert "model card:" in capsys.readouterr().out
    result = json.loads((made / "report" / "results.json").read_text())
    assert f"{result['models'][1]['quality']['perplexity']:,.2f}" in card_of(made / "run")


def hostile(value: Any) -> Any:
    """The same with every string replaced by one that tries everything."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{HOSTILE}\n---\n# x \"\u2028\ufffe' : {{}} [" if isinstance(value, str) else value


def test_nothing_in_a_manifest_gets_out_of_its_place(made: Path) -> None:
    manifest = read_manifest(made / "run")
    assert manifest is not None
    settings = {HOSTILE: HOSTILE, "lr": 1.0}
    rows = [[HOSTILE, "1"], ["| a |", "```"]]
    figures = Figures(("model", "x"), rows, HOSTILE, 3.0, (HOSTILE, "\x85: [\ud800"))
    card = model_card({**hostile(manifest), "command": f"```\n{HOSTILE}"}, settings, figures)
    card.encode("utf-8")
    assert_plain(card)
    data = ModelCard(card).data
    assert data.eval_results[0].metric_value == 3.0
    assert data.library_name == "transformers"
    body = card.split("\n---\n", 1)[1]
    page = MarkdownIt().enable("table").render(body)
    seen = Tags(page)
    assert not seen.tags & {"script", "img", "a"}
    assert page.count("<h1>") == 1


def test_a_manifest_of_any_shape_makes_a_card() -> None:
    assert "A student of - x -" in model_card({}, {})
    odd = {"teacher": [], "stages": {"a": 1}, "student_config": 3, "saved_student": None}
    assert "0 stages" in model_card(odd, {})


def test_the_card_names_the_data_of_a_settings_file(tmp_path: Path) -> None:
    """Where the command only says ``--config``; of a path no more than its end."""
    (tmp_path / "final").mkdir()
    lines = [
        "dataset_name: /data/someone/stories.txt  # file",
        "dataset_config_name: '007'  # file",
    ]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "seed: 3", "max_samples: 0"]))
    path = write_card(tmp_path, {"saved_student": {}, "command": "run --config gone.yaml"})
    assert path is not None
    card = path.read_text(encoding="utf-8")
    assert '"dataset_name": "stories.txt"' in card
    assert '"dataset_config_name": "007"' in card
    assert "someone" not in card


def test_there_is_no_card_without_a_folder_for_it(tmp_path: Path) -> None:
    assert write_card(tmp_path, {"saved_student": {}}) is None
