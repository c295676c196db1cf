"""The notebooks run from their first cell to their last, as plain Python and as notebooks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.source_tree import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
QUICK = "first_distillation"


def run(path: Path, place: Path, *, seconds: float) -> str:
    """What a notebook prints, run in a folder of its own."""
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def shortened(path: Path, folder: Path) -> Path:
    """The notebook on a few documents."""
    text, count = re.subn(r"^DOCUMENTS = \d+", "DOCUMENTS = 3", path.read_text(), flags=re.M)
    assert count == 1
    short = folder / path.name
    short.write_text(text)
    return short


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "first_distillation",
        "own_loss",
        "own_student",
        "reading_a_report",
        "three_hypotheses",
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_it_stands(path: Path, tmp_path: Path) -> None:
    assert run(path, tmp_path, seconds=850).strip()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [QUICK, "own_loss"])
def test_a_notebook_runs_as_a_notebook(name: str, tmp_path: Path) -> None:
    """Converted by jupytext and executed in a kernel; results are shown as tables there."""
    pytest.importorskip("jupytext", reason="`make notebooks` installs it")
    pytest.importorskip("nbclient", reason="`make notebooks` installs it")
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    source = shortened(path, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for module, *arguments in (
        ["jupytext", "--to", "ipynb", source.name],
        ["jupyter", "execute", "--inplace", f"{name}.ipynb"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=550,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((tmp_path / f"{name}.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pages = [
        "".join(output["data"]["text/html"])
        for output in outputs
        if "data" in output and "text/html" in output["data"]
    ]
    assert any("<table" in page and "<svg" in page for page in pages), "results show themselves"
