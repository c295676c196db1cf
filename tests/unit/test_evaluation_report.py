"""The written report: safe with hostile text, honest about NaN, complete or not there."""

import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cleangpt.errors import EnvironmentProblem
from cleangpt.safe_text import clean_line, clean_text
from distillation.evaluation import plots, tables
from distillation.evaluation.report import report_markdown, results_json, write_report
from distillation.evaluation.safe_text import markdown_block, markdown_line

HOSTILE = (
    "<script>alert(1)</script>"
    '"><img src=x onerror=alert(2)> {{ 7 * 7 }} $\\frac$ '
    "\x1b[31mred\x1b]0;title\x07 \u202etxet\u202c \x00\x08 ``` | # \ud800"
)


@pytest.fixture(scope="module")
def result() -> Any:
    from tests.evaluation_samples import evaluated

    return evaluated(num_prompts=1, max_new_tokens=3)


@pytest.fixture
def hostile(result: Any) -> Any:
    changed = json.loads(json.dumps(result))
    for model in changed["models"]:
        model["name"] = model["name"] + HOSTILE
    changed["data"]["name"] = HOSTILE
    changed["notes"] = [HOSTILE]
    changed["environment"]["command"] = HOSTILE
    item = changed["generations"][0]
    item["prompt"], item["reference"] = HOSTILE, HOSTILE + "x" * 1_000_000
    item["continuations"] = {HOSTILE: HOSTILE, "empty": ""}
    return changed


class _Tags(html.parser.HTMLParser):
    """Every start tag and attribute, as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_all_files_are_written_and_nothing_else(result: Any, tmp_path: Path) -> None:
    paths = write_report(result, tmp_path / "deep" / "evaluation")
    names = {path.name for path in (tmp_path / "deep" / "evaluation").iterdir()}
    assert names == set(paths) == {
        "results.json", "report.md", "report.html",
        "models.png", "layer_mse.png", "relative_error.png",
    }  # fmt: skip
    saved = json.loads(paths["results.json"].read_text())
    assert saved["models"][1]["quality"] == result["models"][1]["quality"]
    for name, path in paths.items():
        if name.endswith(".png"):
            assert path.read_bytes().startswith(b"\x89PNG")
            assert name in paths["report.md"].read_text()


def test_what_swapped_blocks_cost_has_a_picture(result: Any, tmp_path: Path) -> None:
    costs = [(0, 0.1, 0.1), (1, 0.2, 0.5)]
    mixed = json.loads(json.dumps(result))
    mixed["hidden_states"]["hybrids"] = [
        {"student_block": block, "kl_alone": alone, "kl_chained": chained}
        for block, alone, chained in costs
    ]
    paths = write_report(mixed, tmp_path)
    picture = paths["hybrids.png"].read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "![" in paths["report.md"].read_text()
    assert "hybrids.png" in paths["report.md"].read_text()
    mixed["hidden_states"]["hybrids"][1]["kl_chained"] = 0.9
    assert write_report(mixed, tmp_path / "more")["hybrids.png"].read_bytes() != picture


def test_hostile_text_is_escaped_and_cut(hostile: Any, tmp_path: Path) -> None:
    paths = write_report(hostile, tmp_path)
    page = paths["report.html"].read_text(encoding="utf-8")
    seen = _Tags()
    seen.feed(page)
    assert "script" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert all(value.startswith("data:") for name, value in seen.attributes if name == "src")
    assert "{{ 7 * 7 }}" in page
    markdown = paths["report.md"].read_text(encoding="utf-8")
    outside_fences = re.sub(r"^(`{3,})text\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    for text in (page, outside_fences):
        assert "<script>alert" not in text
    for text in (page, markdown):
        assert not {"\x1b", "\x00", "\x08", "\u202e"} & set(text)
        assert max(len(line) for line in text.splitlines() if "base64" not in line) < 10_000
    assert paths["results.json"].read_bytes().isascii()


def test_the_page_needs_nothing_from_elsewhere(result: Any, tmp_path: Path) -> None:
    page = write_report(result, tmp_path)["report.html"].read_text(encoding="utf-8")
    assert "http://" not in page
    assert "https://" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_nan_is_null_in_json_and_named_in_the_tables(result: Any, tmp_path: Path) -> None:
    broken = json.loads(json.dumps(result))
    broken["models"][1]["quality"].update(perplexity=float("nan"), kl_nats=float("inf"))
    broken["hidden_states"]["blocks"][0].update(mse=float("nan"), relative_error=float("nan"))
    broken["non_finite"] = {"models.1.quality.perplexity": "nan"}
    saved = json.loads(results_json(broken))
    assert saved["models"][1]["quality"]["perplexity"] is None
    assert saved["non_finite"] == {"models.1.quality.perplexity": "nan"}
    page = write_report(broken, tmp_path)["report.html"].read_text(encoding="utf-8")
    assert "NaN" in page
    assert "not usable" in page
    assert tables.model_rows(broken)[1][2:4] == ("NaN", "inf")


def test_nan_is_not_drawn_as_a_bar(result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from matplotlib.axes import Axes

    broken = json.loads(json.dumps(result))
    for model in broken["models"]:
        model["quality"]["perplexity"] = float("nan")
    heights: list[Any] = []
    draw = Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda self, y, width, **k: heights.append(width) or draw(self, y, width, **k)
    )
    assert plots.draw_plots(broken)["models.png"].startswith(b"\x89PNG")
    assert np.isnan(heights[1]).all()


def test_plots_survive_many_blocks_and_wide_ranges(result: Any) -> None:
    from PIL import Image

    many = json.loads(json.dumps(result))
    block = many["hidden_states"]["blocks"][0]
    many["hidden_states"]["blocks"] = [
        {**block, "student_block": i, "mse": 10.0 ** (i % 7 - 3)} for i in range(48)
    ]
    many["models"][1]["quality"]["perplexity"] = 1e9
    for picture in plots.draw_plots(many).values():
        assert Image.open(io.BytesIO(picture)).width > 600


def test_without_matplotlib_tables_are_written(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "matplotlib_available", lambda: False)
    paths = write_report(result, tmp_path)
    assert set(paths) == {"results.json", "report.md", "report.html"}
    assert "![" not in paths["report.md"].read_text()


def test_two_evaluations_at_once_get_a_folder_each(result: Any, tmp_path: Path) -> None:
    from distillation.evaluation.report import _own_folder

    with _own_folder(tmp_path / "evaluation") as held:
        paths = write_report(result, tmp_path / "evaluation")
    assert held == tmp_path / "evaluation"
    assert paths["report.html"].parent == tmp_path / "evaluation-2"
    assert write_report(result, tmp_path / "evaluation")["report.html"].parent == held


def test_a_place_that_cannot_be_written(result: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentProblem):
        write_report(result, tmp_path / "file" / "evaluation")


def test_markdown_without_hidden_states_and_generations(result: Any) -> None:
    small = json.loads(json.dumps(result))
    small.update(hidden_states=None, generations=[])
    text = report_markdown(small, [])
    assert "## Hidden states" not in text
    assert "## Generations" not in text


def test_clean_text() -> None:
    assert clean_text("a\x1b[1;31mb\x1b[0mc\x9b\r\n\td") == "abc\n\td"
    assert clean_text("x" * 50, limit=10) == "x" * 10 + " ... [cut: 50 characters]"
    assert clean_text("\ud800") == "\N{REPLACEMENT CHARACTER}"
    assert clean_text("\x1b]0;never closed") == ""


def test_clean_line() -> None:
    assert clean_line(" a\n\n b\t c ") == "a b c"
    assert clean_line("x" * 300, limit=20) == "x" * 17 + "..."


def test_markdown() -> None:
    assert markdown_line("a | b <c> *d*") == r"a \| b &lt;c&gt; \*d\*"
    assert markdown_block("````").startswith("`````text")
