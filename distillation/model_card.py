"""The card of a finished student, ``final/README.md``: what it is, how it came about, how good.

Written when a run ends, and again by every evaluation, from what the run has recorded. All of that
may hold text from elsewhere: YAML is made by ``huggingface_hub``, Markdown is escaped.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from cleangpt.errors import UsageError
from cleangpt.integrity import CARD_NAME, parse_json_object
from cleangpt.run_directory import write_atomically
from cleangpt.safe_text import clean_line
from cleangpt.settings_file import written_settings
from cleangpt.structure import count_parameters
from distillation.evaluation.safe_text import markdown_block, markdown_line

logger = logging.getLogger(__name__)

MARK: Final = "<!-- Written anew by every evaluation, unless this line is deleted. -->"
"""A card without it is the user's own."""

DATA_SETTINGS: Final = (
    "dataset_name",
    "dataset_config_name",
    "dataset_split",
    "dataset_text_column",
    "max_samples",
    "streaming",
    "stream_tokens",
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NOT_KEPT = "No command was recorded: it was started in a notebook. What it was given stands below."


@dataclass(frozen=True)
class Figures:
    """What an evaluation found, as it stands on the card.

    Args:
        columns: Heads of the table.
        rows: One row per model.
        sentences: What they say, and of which text.
        perplexity: The student's; None if it is not finite.
        text: Name and split of the text.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    sentences: str
    perplexity: float | None
    text: tuple[str, str]


def saved_student(student: nn.Module) -> dict[str, Any]:
    """What the manifest says of the student that a run leaves, for its card."""
    if getattr(student, "_auto_class", None):
        needs = "the code beside it"
    elif type(student).__module__.startswith("transformers."):
        needs = "nothing"
    else:
        needs = "its class"
    return {
        "class": type(student).__name__,
        "parameters": count_parameters(student),
        "needs": needs,
    }


def write_card(
    run_dir: Path, manifest: dict[str, Any], figures: Figures | None = None
) -> Path | None:
    """Write the card of a run's ``final/``; None without one, or if its card is the user's own.

    Args:
        run_dir: The run.
        manifest: What its manifest says, or will say.
        figures: What an evaluation found; None before the first.

    Raises:
        EnvironmentProblem: If it cannot be written.
    """
    path = run_dir / "final" / CARD_NAME
    if not path.parent.is_dir() or "saved_student" not in manifest:
        return None
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        logger.info("%s is your own text and stays as it is.", path)
        return None
    content = model_card(manifest, _settings(run_dir), figures).encode("utf-8", "replace")
    return write_atomically(path, lambda place: place.write_bytes(content), len(content))


def _settings(run_dir: Path) -> dict[str, Any]:
    """Its ``config.json``, and of ``config.yaml``, which the trainer does not see, the data."""
    try:
        settings = parse_json_object((run_dir / "config.json").read_bytes())
    except (OSError, ValueError):
        settings = {}
    try:
        written = written_settings(run_dir / "config.yaml")
    except UsageError:  # a run from a notebook has none
        written = {}
    data = {name: value for name, value in written.items() if name in DATA_SETTINGS}
    if "dataset_name" in data:
        data["dataset_name"] = _without_place(data["dataset_name"])
    return settings | data


def model_card(
    manifest: dict[str, Any], settings: dict[str, Any], figures: Figures | None = None
) -> str:
    """Return the card as Markdown with YAML at its head.

    Args:
        manifest: What the run was and how it ended.
        settings: Everything that decided it, its ``config.json``.
        figures: What an evaluation found; None before the first.
    """
    kind, teacher = student_kind(manifest), teacher_name(manifest)
    command = manifest.get("command")
    parts = [
        f"---\n{_front_matter(manifest, figures)}\n---\n{MARK}",
        f"# {markdown_line(kind)} student of {markdown_line(teacher)}",
        _story(manifest),
        "## Figures",
        *_figures(figures),
        "## Loading",
        _loading(manifest),
        "## Training",
        _training(manifest),
        _table(_STAGE_COLUMNS, [_stage_row(row) for row in _rows(manifest)]),
        "Student block <- teacher block, whose raw output it learnt: "
        + (", ".join(f"{s} <- {t}" for s, t in enumerate(_layer_map(manifest))) or "not recorded")
        + ".",
        "## Data",
        _data(manifest),
        "## Command",
        markdown_block(str(command)) if command else _NOT_KEPT,
        "## Recipe",
        markdown_block(json.dumps(settings, indent=1, ensure_ascii=True)),
        "## Environment",
        _environment(manifest),
        "## Limits and licence",
        "What the teacher says wrongly, the student says too, and it has lost some of what the"
        " teacher knows. Its weights derive from the teacher's: the teacher's licence applies to"
        " them. The Python files beside them, if any, are Apache-2.0.",
    ]
    return "\n\n".join(parts) + "\n"


def student_kind(manifest: dict[str, Any]) -> str:
    """The kind of student, such as Vanilla."""
    config = _as_dict(manifest.get("student_config"))
    return clean_line(str(config.get("model_type") or "A"), 60)


def teacher_name(manifest: dict[str, Any]) -> str:
    """The teacher's name; of a path its last part, since the rest is of one machine."""
    name = str(_as_dict(manifest.get("teacher")).get("name") or "")
    if name.endswith("cleangpt/builtin/assets"):
        return "builtin"
    return _without_place(name) or "a teacher"


def _without_place(name: str) -> str:
    """A name of a hub as it is, and the last part of a path."""
    if len(name) < 200 and _HUB_NAME.fullmatch(name) and not Path(name).exists():
        return name
    return clean_line(name.replace("\\", "/").rstrip("/").rpartition("/")[2], 80)


def _front_matter(manifest: dict[str, Any], figures: Figures | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    teacher, kind = teacher_name(manifest), student_kind(manifest)
    found = []
    if figures is not None and figures.perplexity is not None:
        name, split = (_yaml_line(part) or "text" for part in figures.text)
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=name,
                dataset_name=name,
                dataset_split=split,
                metric_type="perplexity",
                metric_value=round(figures.perplexity, 4),
            )
        )
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation", "cleangpt-distillation", _yaml_line(kind).lower()],
        base_model=teacher if _HUB_NAME.fullmatch(teacher) and "/" in teacher else None,
        model_name=_yaml_line(f"{kind} student of {teacher}"),
        eval_results=found or None,
    )
    return card.to_yaml()


def _yaml_line(text: str) -> str:
    """One line of characters that every YAML reader takes."""
    return "".join(c if c.isprintable() else "?" for c in clean_line(text, 100))


def _story(manifest: dict[str, Any]) -> str:
    config, teacher = _as_dict(manifest.get("student_config")), _as_dict(manifest.get("teacher"))
    shape = " x ".join(
        _number(config.get(ours, config.get(theirs)))
        for ours, theirs in (("n_layer", "num_hidden_layers"), ("n_embd", "hidden_size"))
    )
    context = config.get("block_size", config.get("max_position_embeddings"))
    stored = _as_dict(manifest.get("saved_student")).get("parameters")
    return (
        f"A student of {shape} (blocks x width), context {_number(context)} tokens, vocabulary"
        f" {_number(config.get('vocab_size'))}, with {_number(stored)} stored parameters. It learnt"
        f" block by block from {markdown_line(teacher_name(manifest))}"
        f" ({markdown_line(str(teacher.get('class')))}, {_number(teacher.get('parameters'))}"
        " parameters): each block the hidden states of a teacher's block, then the head the"
        " teacher's logits. Made with cleanGPT distillation"
        f" {markdown_line(str(manifest.get('library_version')))}."
    )


def _figures(figures: Figures | None) -> list[str]:
    if figures is None:
        return ["Not evaluated yet: the evaluation writes its figures here."]
    return [_table(figures.columns, figures.rows), markdown_line(figures.sentences, 2000)]


_LOADING: Final = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder = "final"  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generate("Return a list of", max_new_tokens=20)[0]["generated_text"])
```

{more}"""
_MORE: Final = {
    "nothing": "The class comes with `transformers`; no other code is needed.",
    "the code beside it": "The Python files beside the weights need `torch` and `transformers`"
    " alone; read them before you trust them.",
    "its class": "Its class is not among these files: import and register it first.",
}


def _loading(manifest: dict[str, Any]) -> str:
    needs = str(_as_dict(manifest.get("saved_student")).get("needs"))
    trust = ", trust_remote_code=True" if needs == "the code beside it" else ""
    return _LOADING.format(trust=trust, more=_MORE.get(needs, ""))


_STAGE_COLUMNS: Final = (
    "stage",
    "teacher block",
    "steps",
    "tokens",
    "seconds",
    "first loss",
    "last",
)


def _rows(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    stages = manifest.get("stages")
    return [row for row in stages if isinstance(row, dict)] if isinstance(stages, list) else []


def _stage_row(row: dict[str, Any]) -> list[str]:
    return [
        str(row.get("stage")),
        _number(row.get("teacher_block")),
        _number(row.get("steps")),
        _number(row.get("tokens")),
        _number(row.get("seconds"), ",.1f"),
        _number(row.get("first_loss"), ".4g"),
        _number(row.get("last_loss"), ".4g"),
    ]


def _training(manifest: dict[str, Any]) -> str:
    rows = _rows(manifest)
    tokens = sum(row["tokens"] for row in rows if isinstance(row.get("tokens"), int))
    seconds = _as_dict(manifest.get("results")).get("seconds")
    return (
        f"{len(rows)} stages, {tokens:,} training tokens over all of them (a token counts in each"
        f" stage and epoch), {_number(seconds, ',.0f')} seconds in all."
    )


def _data(manifest: dict[str, Any]) -> str:
    data = _as_dict(manifest.get("data"))
    shape = (
        f"{_number(data.get('batches'))} batches of {_number(data.get('batch_size'))} windows of"
        f" {_number(data.get('block_size'))} tokens"
    )
    found = manifest.get("data_fingerprint") or data.get("fingerprint")
    fingerprint = f"`{clean_line(str(found), 80).replace('`', '')}`" if found else "not recorded"
    return f"{shape}; fingerprint (SHA-256) {fingerprint}."


def _environment(manifest: dict[str, Any]) -> str:
    names = (
        "torch_version",
        "transformers_version",
        "device",
        "torch_threads",
        "processes",
        "seed",
    )
    precision = _as_dict(manifest.get("precision")).get("used")
    said = [(name.replace("_", " "), manifest.get(name)) for name in names]
    return ", ".join(
        f"{name} {markdown_line(str(value))}"
        for name, value in [*said, ("precision", precision)]
        if value is not None
    )


def _layer_map(manifest: dict[str, Any]) -> list[int]:
    found = manifest.get("layer_map")
    return [item for item in found if isinstance(item, int)] if isinstance(found, list) else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = [list(columns), rule, *([markdown_line(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: Any, spec: str = ",") -> str:
    return format(value, spec) if isinstance(value, int | float) else "-"


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
