"""Write an evaluation to a folder: JSON, Markdown, PNG plots and the page of ``report/page.py``.

Every file is complete or not there, and a signal waits until all are. Two evaluations that write to
one folder at the same time get a folder each. Numbers come from ``evaluator.py``; this file
measures nothing.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cleangpt.disk_errors import disk_errors_explained
from cleangpt.errors import EnvironmentProblem
from cleangpt.run_directory import write_atomically
from cleangpt.runtime.stopping import held_back
from distillation.evaluation import plots, tables
from distillation.evaluation.audit_table import AUDIT_SENTENCE, AUDIT_TITLE, Table, read_audit
from distillation.evaluation.results import EvaluationResult, without_non_finite
from distillation.evaluation.safe_text import markdown_block, markdown_line
from distillation.evaluation.terms import (
    GLOSSARY,
    data_sentence,
    hidden_sentence,
    own_text_sentence,
)
from distillation.report.page import evaluation_page

if sys.platform != "win32":  # Windows has no flock; there the last evaluation to finish wins.
    import fcntl

logger = logging.getLogger(__name__)

MAX_FOLDERS = 100
CAPTIONS = {
    "models.png": "Size and perplexity of every model, on the same text.",
    "layer_mse.png": "Mean squared error of each student block against its teacher block. The "
    "scale of the teacher's states grows with depth, so compare blocks by the next picture.",
    "relative_error.png": "The same error relative to the best constant prediction (1.0).",
    "hybrids.png": "The teacher with student blocks put in: what each costs alone, and together.",
}


def write_report(
    result: EvaluationResult, output_dir: str | Path, *, run_dir: Path | None = None
) -> dict[str, Path]:
    """Write all files, and return name to path.

    Args:
        result: What an evaluation found.
        output_dir: The folder to write to.
        run_dir: The run the student came from, whose audit of the teacher is shown; None has none.

    Raises:
        EnvironmentProblem: If the folder cannot be written.
    """
    pictures: dict[str, bytes] = {}
    if plots.matplotlib_available():
        pictures = plots.draw_plots(result)
    else:
        logger.warning("matplotlib is not installed: tables are written, plots are not.")
    audit = None if run_dir is None else read_audit(run_dir)
    contents = {
        "results.json": results_json(result).encode(),
        "report.md": report_markdown(result, list(pictures), audit).encode(),
        "report.html": evaluation_page(result, run_dir).encode(),
        **pictures,
    }
    with _own_folder(Path(output_dir)) as folder, held_back():
        return {name: _write(folder / name, content) for name, content in contents.items()}


def results_json(result: EvaluationResult) -> str:
    """Return ``results.json``: NaN and infinities as null, ASCII only."""
    return json.dumps(without_non_finite(result), indent=2, allow_nan=False) + "\n"


def report_markdown(
    result: EvaluationResult, plot_names: list[str], audit: Table | None = None
) -> str:
    """Return the report as Markdown, foreign text escaped."""
    data = result["data"]
    parts = [
        "# Evaluation of a distilled model",
        markdown_line(tables.summary(result), 1000),
        tables.markdown_table(tables.MODEL_COLUMNS, tables.model_rows(result), markdown_line),
        tables.markdown_table(*tables.detail_table(result), markdown_line),
        data_sentence(result, markdown_line(f"{data['name']} ({data['split']})")),
    ]
    parts += [f"![{CAPTIONS[name]}]({name})" for name in plot_names]
    if result["hidden_states"] is not None:
        parts += [
            "## Hidden states",
            hidden_sentence(result),
            tables.markdown_table(*tables.block_table(result), markdown_line),
        ]
    if audit is not None:
        table = tables.markdown_table(*audit, markdown_line)
        parts += [f"## {AUDIT_TITLE}", AUDIT_SENTENCE, table]
    own_text = own_text_sentence(result)
    if own_text:
        table = tables.markdown_table(*tables.own_text_table(result), markdown_line)
        parts += ["## On text of their own", own_text, table]
    if result["generations"]:
        settings = json.dumps(result["generation_settings"])
        parts += ["## Generations", f"Same prompts, settings and seed for all: `{settings}`"]
    for item in result["generations"]:
        parts += [f"### Prompt ({item['mode']})", markdown_block(item["prompt"])]
        if item["reference"]:
            parts += ["The text itself goes on:", markdown_block(item["reference"])]
        for name, text in item["continuations"].items():
            parts += [f"**{markdown_line(name)}**", markdown_block(text)]
    if result["notes"]:
        parts += [
            "## Notes",
            "\n".join(f"- {markdown_line(note, 1000)}" for note in result["notes"]),
        ]
    parts += ["## How to read this", "\n".join(f"- **{k}**: {v}" for k, v in GLOSSARY.items())]
    parts += ["## Environment", markdown_block(json.dumps(result["environment"], indent=2))]
    return "\n\n".join(parts) + "\n"


def _write(path: Path, content: bytes) -> Path:
    return write_atomically(path, lambda temporary: temporary.write_bytes(content), len(content))


@contextmanager
def _own_folder(output_dir: Path) -> Iterator[Path]:
    """Hold the folder, or one beside it if another evaluation is writing there right now.

    The folder itself is locked, so no lock file stays behind; the kernel frees it with the process.
    """
    for number in range(1, MAX_FOLDERS):
        folder = output_dir.with_name(f"{output_dir.name}-{number}") if number > 1 else output_dir
        with disk_errors_explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder) as free:
            if free:
                if folder != output_dir:
                    logger.warning("%s is being written; writing to %s.", output_dir, folder)
                yield folder
                return
    raise EnvironmentProblem(
        f"{MAX_FOLDERS} evaluations are writing beside {output_dir}.",
        "Wait for one of them, or choose another --output_dir.",
    )


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Try to lock the folder; whether it worked."""
    if sys.platform == "win32":
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
