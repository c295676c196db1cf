"""Text from elsewhere cannot get out: not into the terminal, the page, the report or the disk."""

import html.parser
import json
import logging
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cleangpt.cli import run_command, setup_logging
from cleangpt.errors import CleanGPTError, InputError
from cleangpt.hub import local_path
from cleangpt.run_directory import RunDirectory
from cleangpt.safe_text import SafeFormatter, clean_line, clean_text

ESCAPES = "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J\x08\x00\u202eright\u202c\u2028line\u200f"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }} | ` [x](javascript:0)"
HOSTILE = f"{ESCAPES}{MARKUP}"


def assert_plain(text: str) -> None:
    """Nothing in it moves a cursor, turns a line round, or ends a line that we did not end."""
    odd = {c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Zl", "Zp")}
    odd |= set(text) & set(
        "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
    )
    assert odd == set(), [hex(ord(character)) for character in odd]


class Tags(html.parser.HTMLParser):
    """Every start tag and attribute, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.evaluation_samples import PROSE, save_run, save_teacher

    root = tmp_path_factory.mktemp("text")
    hostile_name = "\x1b[31m<script>x\u202e"
    save_run(root / "run")
    shutil.copytree(save_teacher(root / "teacher"), root / hostile_name)
    (root / hostile_name).rename(root / f"model {hostile_name}")
    (root / "data").mkdir()
    rows = [{"text": f"{HOSTILE} {text}"} for text in PROSE]
    content = "\n".join(json.dumps(row) for row in rows)
    (root / "data" / "test \x1b[2J<b>.jsonl").write_text(content)
    (root / "prompts.txt").write_text(f"{HOSTILE}\nThe dog\n", encoding="utf-8")
    return root


def evaluate(made: Path, out: Path, **changes: str) -> int:
    from distillation.evaluation.evaluate_distilled_model import main

    (strange,) = made.glob("model *")
    flags = {
        "--model_path": str(made / "run"),
        "--baseline_path": str(strange),
        "--teacher_model_name": str(strange),
        "--dataset_name": str(made / "data"),
        "--prompts_file": str(made / "prompts.txt"),
        "--max_new_tokens": "3",
        "--speed_seconds": "0",
        "--device": "cpu",
        "--output_dir": str(out),
        **{f"--{name}": value for name, value in changes.items()},
    }
    arguments = [part for pair in flags.items() for part in pair]
    return run_command(main, [*arguments, "--generate_comparisons"])


@pytest.mark.slow
def test_an_evaluation_of_hostile_names_prompts_and_text(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = evaluate(made, tmp_path / "out")
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert_plain(shown.out)
    assert_plain(shown.err)
    folder = tmp_path / "out"
    page = (folder / "report.html").read_text(encoding="utf-8")
    seen = Tags(page)
    assert not seen.tags & {"script", "iframe", "object", "b"}
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    links = [value or "" for name, value in seen.attributes if name in ("src", "href")]
    assert all(link.startswith(("data:", "#")) for link in links)  # pictures, and its own sections
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside
    for text in (page, markdown):
        assert_plain(text)
    assert (folder / "results.json").read_bytes().isascii()
    assert {path.parent for path in folder.rglob("*")} == {folder}


def test_names_of_tensors_are_cleaned_in_refusals(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    path = run / "final" / "model.safetensors"
    save_file({**load_file(path), HOSTILE[:80]: torch.zeros(1)}, path, metadata={"format": "pt"})
    assert evaluate(made, tmp_path / "out", model_path=str(run)) == 4
    shown = capsys.readouterr()
    assert_plain(shown.out + shown.err)
    assert shown.err.splitlines()[-2].startswith("error: ")


@pytest.mark.parametrize("flag", ["model_path", "teacher_model_name", "dataset_name"])
@pytest.mark.parametrize("name", [HOSTILE, "../" * 30 + "x", "a" * 5000, "x\0y", "~nobody/x", " "])
def test_names_that_lead_nowhere(
    made: Path, tmp_path: Path, flag: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(made, tmp_path / "out", **{flag: name}) == 3
    shown = capsys.readouterr()
    assert_plain(shown.out + shown.err)
    *_, cause, remedy = shown.err.splitlines()
    assert cause.startswith("error: ")
    assert remedy.startswith("fix: ")
    assert len(cause) < 2100
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a" * 5000, "x\0y", "file/out"])
def test_output_directories_that_cannot_be(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")

    def main(argv: list[str] | None) -> None:
        place = RunDirectory(tmp_path / name)
        place.check_room(overwrite=False)
        with place.opened({}):
            pass

    assert run_command(main, []) == 5
    assert "defect of ours" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["..", "../..", "/etc", "a/../..", ".", ""])
def test_a_configuration_does_not_lead_out_of_its_data_set(tmp_path: Path, name: str) -> None:
    from cleangpt.data import load_texts

    (tmp_path / "secret.txt").write_text("secret " * 100)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text("open " * 100)
    source = load_texts(str(tmp_path / "data"), config_name=name)
    assert not any("secret" in text for text in source.texts)


def test_a_log_line_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    log = logging.getLogger("cleangpt.data")
    log.warning("data set %s", "x\n12:00:00 INFO all is well\r12:00:01 INFO too\x1b[1A")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("data set x")
    assert [line for line in lines[1:] if not line.startswith("    ")] == []
    assert_plain("\n".join(lines))


def test_tracebacks_are_cleaned_too(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str] | None) -> None:
        raise InputError(f"bad {ESCAPES}", "x")

    assert run_command(main, ["--debug"]) == 3
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert_plain(shown)
    record = logging.LogRecord("x", 30, "x.py", 1, "%s", (ESCAPES,), None)
    try:
        raise ValueError(ESCAPES)
    except ValueError:
        record.exc_info = sys.exc_info()
    assert_plain(SafeFormatter().format(record))


def test_cleaning_keeps_what_people_write() -> None:
    text = (
        "na\u00efve \u65e5\u672c\u8a9e \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f600\n\ttab"
    )
    assert clean_text(text) == text
    assert clean_line("  two\n lines\t") == "two lines"
    assert clean_text("\ud800") == "\N{REPLACEMENT CHARACTER}"


def test_cleaning_a_gigabyte_is_as_quick_as_a_line() -> None:
    assert len(clean_text("\x1b[31m" * 10_000_000)) < 100
    assert len(clean_line("x" * 50_000_000, 2000)) == 2000


@pytest.mark.parametrize("name", [HOSTILE, "a" * 5000, "x\0y"])
def test_local_path_refuses_in_our_words(name: str) -> None:
    with pytest.raises(CleanGPTError):
        local_path(name, flag="--x")
