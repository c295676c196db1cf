"""The page of a run: whole, whatever the run lacks; hostile text is text; nothing is loaded."""

import copy
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cleangpt.cli import run_command
from cleangpt.errors import CheckpointError, InputError, UsageError
from distillation.recipes import RECIPES
from distillation.report.__main__ import main, write_page
from distillation.report.comparison import comparison_page
from distillation.report.page import run_page
from distillation.report.run_files import read_run
from distillation.report.watch import Meter, lines_of
from distillation.report.words import hints, recipe_sentence
from tests.contract.source_tree import ROOT
from tests.report_samples import (
    HOSTILE,
    audit_of,
    evaluation_of,
    stage_row,
    stage_rows,
    write_run,
)

VOID = {"meta", "br", "hr", "img", "link", "input"}
CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Page(html.parser.HTMLParser):
    """Tags, attributes, ids and text as a browser sees them; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data.strip())

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def check_safe(page: str) -> Page:
    """One file: no script, no handler, nothing from elsewhere, links inside the page only."""
    seen = Page(page)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert all(value.startswith("#") for value in seen.values("href"))
    assert not seen.values("src")
    assert CSP in seen.values("content")
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    ids = seen.values("id")
    assert len(ids) == len(set(ids))
    assert {value.removeprefix("#") for value in seen.values("href")} <= set(ids)
    assert seen.tags.count("h1") == seen.tags.count("main") == 1
    charts = seen.tags.count("svg") - seen.values("aria-hidden").count("true")
    assert seen.values("role").count("img") == charts
    return seen


def full_run(folder: Path, **changes: Any) -> Path:
    return write_run(folder, evaluation=evaluation_of(), audit=audit_of(), **changes)


def test_a_whole_run_has_every_section(tmp_path: Path) -> None:
    page = run_page(full_run(tmp_path / "whole"))
    seen = check_safe(page)
    for heading in (
        "Models", "Size, speed and quality", "Training", "Head", "Polish", "Error of every block",
        "Layer pairs", "The teacher with student blocks put in", "Outlier channels of the teacher",
        "What 16 channels can hold", "Generations side by side", "Layer map",
        "Plan against actual", "Command and environment",
    ):  # fmt: skip
        assert heading in seen.headings, heading
    for text in (
        "Its perplexity is 30.00 against 20.00",
        "planned 5.0 s",
        "Planned 5.0 s, took 9.0 s (+80 %)",
        "python -m examples.run_distillation_example --output_dir runs/x",
        "The recipe best, as it stands",
        "student block 2",
        "prefers-color-scheme: dark",
        "@media print",
    ):
        assert text in page or text in str(seen.values("aria-label")), text
    assert '<p class="missing">' not in page


def test_a_recipe_is_itself_for_every_kind_of_student() -> None:
    best = RECIPES["best"]
    for kind in ("Vanilla", "SASP"):
        assert "as it stands" in recipe_sentence(best.settings_for(kind))
    assert "as it stands" not in recipe_sentence({**best.settings, "polish_hidden_weight": 1.0})


@pytest.mark.parametrize("status", ["done", "running", "stopped", "failed"])
def test_what_a_run_lacks_is_said_with_the_command(status: str, tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "bare", [], status=status, settings={}, command=None, planned=None, results=None
    )
    page = run_page(run)
    check_safe(page)
    assert f'class="status {status}"' in page
    assert "--generate_comparisons" in page
    assert f"--model_path {run}" in page
    assert "--audit_tokens 8192" in page
    assert "--plan" in page
    assert "No stage has learnt anything yet" in page
    assert "Not written down" in page


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    going_on = [
        {"event": "validation", "stage": "polish", "epochs_done": 0, "loss": 2.5},
        {"event": "step", "stage": "polish", "step": 5, "loss": 1.5, "tokens_per_second": 100.0},
    ]
    run = write_run(tmp_path / "on", stage_rows(False), status="running", going_on=going_on)
    page = run_page(run)
    check_safe(page)
    assert "going on, loss 1.5" in page
    assert "It is going on." in page


def test_without_head_and_polish(tmp_path: Path) -> None:
    settings = {"train_lm_head": False, "polish_epochs": 0, "schedule": "decoupled"}
    run = write_run(tmp_path / "blocks", stage_rows(False), settings=settings)
    page = run_page(run)
    seen = check_safe(page)
    assert "Polish" not in seen.headings
    assert "--no_train_lm_head" in page
    assert "--polish_epochs 3" in page
    assert "apart from each other" in page


def test_a_head_that_was_only_set(tmp_path: Path) -> None:
    none = {"first_loss": None, "best_loss": None, "last_loss": None, "validation_losses": [],
            "steps": 0}  # fmt: skip
    rows = [*stage_rows(False), stage_row("lm-head", **none)]
    run = write_run(tmp_path / "set", rows[:-1], going_on=[{"event": "head", **rows[-1]}])
    page = run_page(run)
    check_safe(page)
    assert "The head was set in closed form or copied" in page


def test_an_hf_student_and_blocks_that_did_not_learn(tmp_path: Path) -> None:
    rows = [stage_row("block-01", 1), stage_row("block-00", 0, steps=0, relative_error=None)]
    config = {"model_type": "gpt2", "num_hidden_layers": 2, "hidden_size": 8}
    page = run_page(write_run(tmp_path / "hf", rows, student_config=config))
    check_safe(page)
    assert "A gpt2 student of 1,000 parameters, 2 blocks of width 8," in page


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    evaluation = evaluation_of()
    for model in evaluation["models"]:
        model["name"] += HOSTILE
    evaluation["data"]["name"] = HOSTILE
    evaluation["notes"] = [HOSTILE]
    evaluation["environment"] = {HOSTILE: HOSTILE, "command": HOSTILE}
    evaluation["non_finite"] = {"data.num_bytes": "nan"}
    item = evaluation["generations"][0]
    item["prompt"], item["reference"] = HOSTILE, HOSTILE + "x" * 1_000_000
    item["continuations"] = {HOSTILE: HOSTILE, "empty": ""}
    rows = [stage_row(HOSTILE, verdict=HOSTILE), stage_row("block-00", 0, verdict=HOSTILE)]
    run = write_run(
        tmp_path / "<b>run & co",
        rows,
        evaluation=evaluation,
        audit=audit_of(),
        settings={HOSTILE: HOSTILE, "lr_per_block": HOSTILE, "schedule": HOSTILE},
        command=HOSTILE,
        reason=HOSTILE,
        device=HOSTILE,
        student_config={"model_type": HOSTILE},
        teacher={"name": HOSTILE, HOSTILE: HOSTILE},
        planned={"seconds": HOSTILE, "stages": [{"stage": HOSTILE, "seconds": 1.0}, 7]},
    )
    page = run_page(run)
    check_safe(page)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7 * 7 }}" in page
    assert not {"\x1b", "\x00", "\x08", "\x07", "\u202e"} & set(page)
    assert max(map(len, page.splitlines())) < 20_000
    names = [run, full_run(tmp_path / "other")]
    compared = write_page(names, str(tmp_path / "compared.html")).read_text()
    check_safe(compared)
    assert "<script>alert" not in compared


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    run = full_run(tmp_path / "odd")
    (run / "config.json").write_text("[1]")
    (run / "audit.json").write_text('{"levels": 7}')
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{ half a line\n[]\n" + '{"event": "step", "stage": "polish", "step": -1}\n')
        file.write('{"event": "step", "stage": 7}\n{"event": "step", "stage": "p", "step": 1}\n')
        huge = "1" + "0" * 400
        file.write(f'{{"event": "step", "stage": "p", "step": {huge}, "loss": 1}}\n')
        file.write(f'{{"event": "step", "stage": "p", "step": 2, "loss": {huge}}}\n')
        file.write("[" * 100_000 + "\n")
    broken = evaluation_of()
    del broken["models"][1]["quality"]["kl_nats"]
    (run / "evaluation" / "results.json").write_text(json.dumps(broken))
    page = run_page(run)
    check_safe(page)
    assert "config.json cannot be read" in page
    assert "3 lines of metrics.jsonl cannot be read" in page
    assert "results.json is not what" in page
    assert "was not evaluated yet" in page


def test_nan_is_named_and_not_drawn(tmp_path: Path) -> None:
    evaluation = evaluation_of()
    places = {"models.1.quality.perplexity": "nan", "hidden_states.blocks.1.relative_error": "inf",
              "hidden_states.similarity.0.0": "nan"}  # fmt: skip
    evaluation["models"][1]["quality"]["perplexity"] = None
    evaluation["hidden_states"]["blocks"][1]["relative_error"] = None
    evaluation["hidden_states"]["similarity"][0][0] = None
    evaluation["non_finite"] = places
    page = run_page(write_run(tmp_path / "nan", evaluation=evaluation))
    check_safe(page)
    assert "not usable" in page
    assert 'class="no-heat"' in page
    assert "models.1.quality.perplexity = nan" in page
    assert '="nan' not in page


@pytest.mark.parametrize(
    "loss", ["null", "NaN", "1e308", "-1e308", "1e-320", "4611686018427387904"]
)
def test_losses_that_are_no_numbers_or_too_large_break_no_page(loss: str, tmp_path: Path) -> None:
    wrong = dict.fromkeys(("first_loss", "best_loss", "last_loss", "relative_error"), "@")
    row = stage_row("block-00", 0, seconds="@", steps="@", validation_losses=["@"], **wrong)
    row |= {"event": "block"}
    run = write_run(tmp_path / "odd", [], status="failed", reason="NonFiniteError: a loss")
    events = [{"event": "step", "stage": "x", "step": s, "loss": "@"} for s in (1, 2**62)]
    held_out = {"event": "validation", "stage": "block-00"}
    events += [{**held_out, "loss": value} for value in ("@", 1, "@")]
    lines = [json.dumps(event).replace('"@"', loss) for event in [row, *events]]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = run_page(run)
    check_safe(page)
    assert "It failed before its end" in page
    assert '="nan' not in page
    check_safe(comparison_page([run, run]))
    assert lines_of(read_run(run), Meter(), 80)[0].startswith("odd, failed")


def test_older_evaluations_have_no_layer_pairs(tmp_path: Path) -> None:
    evaluation = evaluation_of()
    del evaluation["hidden_states"]["similarity"]
    page = run_page(write_run(tmp_path / "old", evaluation=evaluation))
    assert "The map of layer pairs needs an evaluation" in page


def test_comparison_shows_what_differs(tmp_path: Path) -> None:
    first = full_run(tmp_path / "a")
    better = evaluation_of()
    better["models"][1]["quality"]["perplexity"] = 25.0
    second = write_run(tmp_path / "b", evaluation=better, seed=7, student_config={"n_embd": 32})
    third = write_run(tmp_path / "c", stage_rows(False), status="stopped")
    path = write_page([first, second, third], str(tmp_path / "out" / "page.html"))
    page = path.read_text()
    seen = check_safe(page)
    assert {"block-00", "polish", "Error of every block", "What differs"} <= set(seen.headings)
    assert "b has the lowest perplexity, 25, and a the highest, 30." in page
    assert "c was not evaluated:" in page
    assert re.search(r"seed</th><td>0</td><td>7</td>", page)
    assert re.search(r"student n_embd</th><td>16</td><td>32</td>", page)
    assert ">run_id<" not in page


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = full_run(tmp_path / "r")
    assert run_command(main, [str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'evaluation' / 'report.html'}\n"
    assert run_command(main, [str(run), "--output", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").read_bytes() == (run / "evaluation" / "report.html").read_bytes()
    for arguments, code in (
        ([], 2),
        ([str(run), "--watch", str(run)], 2),
        (["--watch", str(run), "--output", "x"], 2),
        ([str(tmp_path / "nowhere")], 3),
        ([str(tmp_path)], 3),
    ):
        assert run_command(main, arguments) == code
        said = capsys.readouterr().err.splitlines()
        assert [line.split(":")[0] for line in said] == ["error", "fix"]


def test_it_needs_no_model_and_no_torch(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r")
    code = f"""
import sys
from distillation.report.__main__ import main
main([{str(run)!r}])
assert not {{"torch", "transformers", "datasets", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["seed"] = 1
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="was changed"):
        read_run(run)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        read_run(tmp_path)


def test_samples_are_what_an_evaluation_writes() -> None:
    from tests.evaluation_samples import evaluated

    def keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: keys(item) for key, item in value.items()}
        return [keys(value[0])] if isinstance(value, list) and value else None

    real, sample = copy.deepcopy(evaluated(num_prompts=1, max_new_tokens=2)), evaluation_of()
    for free in ("generation_settings", "environment", "settings"):
        real[free] = sample[free] = {}
    real["generations"][0]["continuations"] = sample["generations"][0]["continuations"] = {}
    real["models"][0]["speed"] = sample["models"][0]["speed"] = None
    hidden = (real["hidden_states"], sample["hidden_states"])
    assert all(found["hybrids"] is not None for found in hidden)
    for found in hidden:
        found["hybrids"] = []
    assert keys(real) == keys(sample)


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    run, output = full_run(tmp_path / "run"), tmp_path / "mine.html"
    write_page([run], str(output))
    write_page([run, run], str(output))
    assert output.read_text() == comparison_page([run, run])
    output.write_text("<p>mine</p>")
    with pytest.raises(UsageError, match=r"mine\.html is there and is no report"):
        write_page([run], str(output))
    assert output.read_text() == "<p>mine</p>"


def test_the_evaluation_is_named_with_the_settings_of_the_run(tmp_path: Path) -> None:
    """Whether they stood in a file or on the command line."""
    run = write_run(tmp_path / "a run", command="python -m run --config gone.yaml")
    lines = ["dataset_name: my data  # file", "dataset_config_name: '007'  # file"]
    lines += ["dataset_text_column: null  # default", "teacher_model_name_or_path: builtin"]
    lines += ["streaming: true  # file", "teacher_device_map: auto  # file"]
    (run / "config.yaml").write_text("\n".join(lines))
    wanted = f"--model_path '{run}' --teacher_model_name builtin --teacher_device_map auto"
    wanted += " --dataset_name 'my data' --dataset_config_name 007 --dataset_split validation"
    wanted += " --streaming --max_samples 200"
    assert hints(read_run(run), None)["evaluate"].endswith(f"{wanted} --generate_comparisons")
