"""The page of one run, of one evaluation, or of both."""

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cleangpt.safe_text import clean_line, clean_text
from distillation.evaluation import tables
from distillation.evaluation.audit_table import AUDIT_SENTENCE, AUDIT_TITLE, read_audit
from distillation.evaluation.results import EvaluationResult
from distillation.evaluation.terms import (
    GLOSSARY,
    data_sentence,
    hidden_sentence,
    own_text_sentence,
)
from distillation.report import block_figures, figures, words
from distillation.report.run_files import (
    Run,
    group,
    is_count,
    is_run,
    number,
    numbers,
    read_run,
    shown,
)

STAGE_COLUMNS = (
    "stage",
    "teacher block",
    "steps",
    "tokens",
    "first loss",
    "best loss",
    "last loss",
    "held out, start",
    "held out, best",
    "relative error",
    "seconds",
    "verdict",
)
ENVIRONMENT = {
    "library_version": "cleanGPT distillation",
    "torch_version": "torch",
    "transformers_version": "transformers",
    "device": "device",
    "torch_threads": "threads",
    "processes": "processes",
    "cpu_capability": "CPU instructions",
    "precision": "precision",
    "seed": "seed",
    "optimizer": "optimizer",
    "attention": "attention of teacher and student",
    "teacher": "teacher",
    "data": "training data",
    "validation_data": "held-out data",
    "run_id": "run",
}
"""What of the manifest is the environment of a run, and how the page calls it."""


def environment() -> Environment:
    """The templates; every value is cleaned and escaped, a name that is not given is an error."""
    templates = Environment(
        loader=PackageLoader("distillation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_cleaned,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(text=_shown_text, line=clean_line)
    return templates


def run_page(run_dir: str | Path) -> str:
    """The page of a run, with its evaluation if there is one."""
    run = read_run(run_dir)
    return render_page(run, run.evaluation)


def evaluation_page(result: EvaluationResult, run_dir: Path | None) -> str:
    """The page of an evaluation, with the run of its student if there is one."""
    run = read_run(run_dir) if run_dir is not None and is_run(run_dir) else None
    return render_page(run, result)


def render_page(run: Run | None, result: EvaluationResult | None) -> str:
    """Put a page together of what there is."""
    title = _title(run, result)
    values: dict[str, Any] = {
        "title": title,
        "run": run,
        "result": result,
        "story": words.story(run, result),
        "tiles": words.tiles(run, result),
        "hints": words.hints(run, result),
        "sections": _sections(run),
        "status": None if run is None else run.status,
        "meta": _meta(run, result),
        "glossary": GLOSSARY,
        "notes": [*([] if result is None else result["notes"]), *(run.problems if run else [])],
        "commands": _commands(run, result),
        "environment_rows": _environment_rows(run, result),
        **_model_values(result),
        **_block_values(run, result),
        **({} if run is None else _run_values(run)),
    }
    return environment().get_template("page.html").render(values)


def _cleaned(value: object) -> object:
    """Text without characters that no page should hold; markup of ours as it is."""
    return clean_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _shown_text(text: str) -> str:
    """Text as a page shows it; nothing is shown as such."""
    return clean_text(text).rstrip() or "(nothing)"


def _title(run: Run | None, result: EvaluationResult | None) -> str:
    if run is not None:
        return f"{words.student_kind(run)} from {words.teacher_name(run)}: {run.name}"
    assert result is not None, "a page is of a run or of an evaluation"
    name = result["models"][1]["name"]
    return f"{name[:1].upper()}{name[1:]} against {result['models'][0]['name']}"


def _meta(run: Run | None, result: EvaluationResult | None) -> str:
    if run is None:
        return "An evaluation; the run of the student is not there."
    parts = [words.student_shape(run), f"run {str(run.manifest.get('run_id'))[:8]}"]
    if result is not None:
        parts.append(f"evaluated on {result['data']['name'] or 'text'} {result['data']['split']}")
    return " \N{MIDDLE DOT} ".join(part.strip() for part in parts if part)


def _sections(run: Run | None) -> list[tuple[str, str]]:
    found = [("models", "Models"), ("blocks", "Blocks"), ("generations", "Generations")]
    if run is not None:
        found.insert(1, ("training", "Training"))
        found.insert(3, ("teacher", "Teacher"))
        found.append(("recipe", "Recipe and plan"))
    return [*found, ("environment", "Command"), ("reading", "Terms")]


def _model_values(result: EvaluationResult | None) -> dict[str, Any]:
    if result is None:
        return {"data_sentence": "", "model_tables": [], "model_figures": [], "roles": []}
    data = result["data"]
    roles = [model["role"] for model in result["models"]]
    figure = figures.size_speed_quality(result["models"], roles)
    return {
        "data_sentence": data_sentence(result, f"{data['name'] or 'given'} ({data['split']})"),
        "model_tables": [
            (tables.MODEL_COLUMNS, tables.model_rows(result)),
            tables.detail_table(result),
        ],
        "roles": roles,
        "model_figures": [figure] if figure else [],
        "generation_settings": json.dumps(result["generation_settings"]),
        "own_text_sentence": own_text_sentence(result),
        "own_text_table": tables.own_text_table(result),
        "student_name": result["models"][1]["name"],
    }


def _block_values(run: Run | None, result: EvaluationResult | None) -> dict[str, Any]:
    heat_map = None if result is None else block_figures.heat_map(result)
    made = [
        block_figures.block_errors(run, result),
        heat_map,
        None if result is None else block_figures.hybrids(result),
    ]
    columns, rows = ((), []) if result is None else tables.block_table(result)
    return {
        "block_figures": [figure for figure in made if figure],
        "has_heat_map": heat_map is not None,
        "block_columns": columns,
        "block_rows": rows,
        "hidden_sentence": "" if result is None else hidden_sentence(result),
    }


def _run_values(run: Run) -> dict[str, Any]:
    audit = read_audit(run.path)
    recipe, _ = words.recipe_of(run.settings)
    usual = {**recipe.options, **recipe.training}
    made = [block_figures.layer_map(run), figures.plan_against_actual(run)]
    columns, rows = _stage_table(run)
    return {
        "curves": figures.training_curves(run),
        "log_interval": shown(run.settings.get("log_interval")),
        "polish_note": _polish_note(run),
        "absent_stages": _absent_stages(run),
        "stage_columns": columns,
        "stage_rows": rows,
        "audit": audit,
        "audit_title": AUDIT_TITLE,
        "audit_sentence": AUDIT_SENTENCE,
        "audit_figures": block_figures.audit_figures(run) if audit else [],
        "recipe_sentence": words.recipe_sentence(run.settings),
        "recipe_name": recipe.name,
        "recipe_figures": [figure for figure in made if figure],
        "plan_sentence": _plan_sentence(run),
        "setting_rows": [
            (name, shown(value), shown(usual[name]) if name in usual else "")
            for name, value in run.settings.items()
        ],
    }


def _polish_note(run: Run) -> str:
    if not number(run.settings.get("polish_hidden_weight")) > 0:
        return ""
    return (
        " The training loss of the polish includes the hidden states at their fading weight; its"
        " held-out loss is that of the logits alone."
    )


def _absent_stages(run: Run) -> list[str]:
    """Why a head or a polish has no curve."""
    begun = {curve.stage for curve in run.curves}
    trained = {curve.stage for curve in run.curves if curve.steps}
    found = []
    if run.settings.get("train_lm_head") is False:
        found.append("The head was not part of this run (--no_train_lm_head).")
    elif "lm-head" in begun and "lm-head" not in trained:
        found.append("The head was set in closed form or copied; --lm_head_epochs trains it too.")
    if run.settings.get("polish_epochs") == 0:
        found.append("There was no polish; --polish_epochs 3 trains the whole student at the end.")
    return found


def _stage_table(run: Run) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Every finished stage; a column that no stage filled is left out."""
    rows = [_stage_row(row) for row in run.rows]
    kept = [i for i in range(len(STAGE_COLUMNS)) if any(row[i] != "-" for row in rows)]
    return (
        tuple(STAGE_COLUMNS[i] for i in kept),
        [tuple(row[i] for i in kept) for row in rows],
    )


def _stage_row(row: dict[str, Any]) -> tuple[str, ...]:
    held_out = numbers(row.get("validation_losses"))
    finite = [loss for loss in held_out if math.isfinite(loss)]
    counts = [f"{row[k]:,}" if is_count(row.get(k)) else "-" for k in ("steps", "tokens")]
    teacher = row.get("teacher_block")
    losses = [_figure(row.get(key)) for key in ("first_loss", "best_loss", "last_loss")]
    return (
        clean_line(str(row.get("stage")), 40),
        str(teacher) if is_count(teacher) else "-",
        *counts,
        *losses,
        _figure(held_out[0]) if held_out else "-",
        _figure(min(finite)) if finite else "-",
        _figure(row.get("relative_error")),
        tables.format_number(number(row.get("seconds")), ",.1f"),
        clean_line(str(row.get("verdict") or "-"), 40),
    )


def _figure(value: object) -> str:
    found = number(value)
    return format(found, ".4g") if math.isfinite(found) else "-"


def _plan_sentence(run: Run) -> str:
    planned = group(run.manifest.get("planned"))
    seconds, took = number(planned.get("seconds")), words.seconds_taken(run)
    if not math.isfinite(seconds):
        return ""
    memory, disk = planned.get("memory_bytes"), planned.get("disk_bytes")
    sizes = ((memory, "memory"), (disk, "disk"))
    room = [f"{tables.format_bytes(size)} of {what}" for size, what in sizes if is_count(size)]
    also = f" Planned besides: {' and '.join(room)}." if room else ""
    if run.status != "done":
        return f"Planned {words.duration(seconds)}; {words.duration(took)} so far.{also}"
    ratio = f" ({100 * (took / seconds - 1):+.0f} %)" if seconds > 0 else ""
    return (
        f"Planned {words.duration(seconds)}, took {words.duration(took)}{ratio}; the whole run also"
        f" measures, checks and saves.{also}"
    )


def _commands(run: Run | None, result: EvaluationResult | None) -> list[tuple[str, str]]:
    found = []
    if run is not None:
        told = run.manifest.get("command")
        found.append(("Training", str(told or "Not written down: the run was made from Python.")))
    command = None if result is None else result["environment"].get("command")
    if command:
        found.append(("Evaluation", str(command)))
    if run is not None:
        found.append(("This page", f"python -m distillation.report {run.path}"))
    return found


def _environment_rows(run: Run | None, result: EvaluationResult | None) -> list[tuple[str, str]]:
    rows = []
    for key, name in ENVIRONMENT.items():
        value = None if run is None else run.manifest.get(key)
        if value is not None:
            rows.append((name, _in_words(value)))
    evaluated = {} if result is None else result["environment"]
    rows += [
        (f"evaluation: {key}", shown(value)) for key, value in evaluated.items() if key != "command"
    ]
    if result is not None:
        rows.append(("evaluation: text (SHA-256)", result["data"]["fingerprint"]))
    return rows


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        known = [(key, item) for key, item in value.items() if item is not None]
        return ", ".join(f"{key} {shown(item)}" for key, item in known)
    if isinstance(value, list):
        return ", ".join(shown(item) for item in value)
    return shown(value)
