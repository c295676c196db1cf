"""Write an evaluation to a folder: JSON, Markdown, PNG plots and one self-contained HTML page.

Every file is complete or not there, and a signal waits until all are. Two evaluations that write to
one folder at the same time get a folder each. Numbers come from ``evaluator.py``; this file
measures nothing.
"""

import base64
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cleangpt.disk_errors import disk_errors_explained
from cleangpt.errors import EnvironmentProblem
from cleangpt.run_directory import write_atomically
from cleangpt.runtime.stopping import held_back
from cleangpt.safe_text import clean_line, clean_text
from distillation.evaluation import plots, tables
from distillation.evaluation.audit_table import AUDIT_SENTENCE, AUDIT_TITLE, Table, read_audit
from distillation.evaluation.results import EvaluationResult, without_non_finite
from distillation.evaluation.safe_text import markdown_block, markdown_line

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
STITCH_TEXTS = {
    "saved": "through the run's own stitching layers",
    "identity": "directly, as both have the same width",
    "least_squares": "through stitches fitted by least squares on every other window and measured "
    "on the rest, as the run saved none",
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
    light: dict[str, bytes] = {}
    dark: dict[str, bytes] = {}
    if plots.matplotlib_available():
        light, dark = plots.draw_plots(result), plots.draw_plots(result, plots.DARK)
    else:
        logger.warning("matplotlib is not installed: tables are written, plots are not.")
    audit = None if run_dir is None else read_audit(run_dir)
    contents = {
        "results.json": results_json(result).encode(),
        "report.md": report_markdown(result, list(light), audit).encode(),
        "report.html": report_html(result, light, dark, audit).encode(),
        **light,
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
        _data_sentence(result, markdown_line(f"{data['name']} ({data['split']})")),
    ]
    parts += [f"![{CAPTIONS[name]}]({name})" for name in plot_names]
    if result["hidden_states"] is not None:
        parts += [
            "## Hidden states",
            _hidden_sentence(result),
            tables.markdown_table(*tables.block_table(result), markdown_line),
        ]
    if audit is not None:
        table = tables.markdown_table(*audit, markdown_line)
        parts += [f"## {AUDIT_TITLE}", AUDIT_SENTENCE, table]
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


GLOSSARY = {
    "perplexity": "exp of the mean negative log likelihood per token. Every token but the first is "
    "scored once, in a sliding window, with the same context for all models.",
    "KL to teacher": "KL(teacher || model) in nats per token, at temperature 1; 0 for the teacher.",
    "top-1 agreement": "how often the model's most likely token is the teacher's.",
    "bits per byte": "the loss per byte of text; comparable between tokenizers.",
    "chained error": "squared error of a block's hidden states, divided by that of the teacher's "
    "own mean: 0 is perfect, 1 is what a constant reaches. The block reads what the student's "
    "blocks before it make.",
    "local error": "the same share as the run recorded it when the block had learnt: on the inputs "
    "it learnt from (--block_inputs), on training text, and on states as its loss compares them.",
    "KL in the teacher": "KL to the teacher, in nats per token, of the teacher itself with this "
    "student block in place of those it stands for; then with all student blocks before it too.",
    "tokens/s": "one window at a time; models take turns, and the median counts.",
    "decode tokens/s": "greedy generation with the cache, batch 1.",
}


def report_html(
    result: EvaluationResult,
    light: Mapping[str, bytes],
    dark: Mapping[str, bytes],
    audit: Table | None = None,
) -> str:
    """Return one HTML page with everything inside; every value is escaped by the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("distillation.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(text=_shown_text, line=clean_line, capital=_capital)
    data = result["data"]
    return environment.get_template("report.html").render(
        result=result,
        summary=tables.summary(result),
        tables=[
            (tables.MODEL_COLUMNS, tables.model_rows(result)),
            tables.detail_table(result),
        ],
        block_columns=tables.block_table(result)[0],
        block_rows=tables.block_table(result)[1],
        data_sentence=_data_sentence(result, clean_line(f"{data['name']} ({data['split']})")),
        hidden_sentence=_hidden_sentence(result),
        audit=audit,
        audit_title=AUDIT_TITLE,
        audit_sentence=AUDIT_SENTENCE,
        pictures=[
            (CAPTIONS[name], _data_uri(light[name]), _data_uri(dark[name])) for name in light
        ],
        generation_settings=json.dumps(result["generation_settings"]),
        glossary=GLOSSARY,
        environment=json.dumps(result["environment"], indent=2),
    )


def _shown_text(text: str) -> str:
    """Text as a page shows it; nothing is shown as such."""
    return clean_text(text).rstrip() or "(nothing)"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _data_sentence(result: EvaluationResult, name: str) -> str:
    data = result["data"]
    return (
        f"Text: {name}, {data['num_documents']:,} documents, {data['num_tokens']:,} tokens, in "
        f"{data['num_windows']:,} windows of {data['seq_len']} tokens, stride {data['stride']}."
    )


def _hidden_sentence(result: EvaluationResult) -> str:
    hidden = result["hidden_states"]
    if hidden is None:
        return ""
    return (
        f"Raw block outputs compared {STITCH_TEXTS[hidden['stitch']]}, over "
        f"{hidden['num_positions']:,} positions, as chained: each block gets its own model's input."
    )


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
