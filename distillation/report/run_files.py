"""The files of a run, read for people: what cannot be read is a note, never an end.

Only a folder that is no run at all, and a manifest that was changed, are refused. The evaluation's
``results.json`` carries no checksum, so it is tried out before anything is shown of it.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cleangpt.errors import InputError
from cleangpt.integrity import parse_json_object
from cleangpt.manifest import MANIFEST_NAME, read_manifest
from cleangpt.run_lock import holder_lives
from distillation.evaluation import tables
from distillation.evaluation.results import FORMAT_VERSION, EvaluationResult, with_non_finite
from distillation.evaluation.terms import own_text_sentence

METRICS_NAME = "metrics.jsonl"
LARGEST = 1e100
"""Of a number that is still taken for one: JSON has any, and sums and axes need room above it."""
MAX_LINE = 1_000_000
"""Characters of a line of metrics that is still read; ours have some hundreds."""


@dataclass
class Curve:
    """What one stage wrote down while it learnt.

    Args:
        stage: Its name.
        steps: (optimizer step from 1, training loss) of the logged steps, first one included.
        epochs: Mean training loss of each epoch.
        validation: Loss on held-out text before the first epoch, then after each.
        tokens_per_second: At the newest logged step; NaN before one.
        row: What the stage said at its end; empty while it goes on.
    """

    stage: str
    steps: list[tuple[int, float]] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    tokens_per_second: float = math.nan
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def newest(self) -> float:
        """The newest training loss; NaN if none was written down."""
        return self.steps[-1][1] if self.steps else self.epochs[-1] if self.epochs else math.nan


@dataclass(frozen=True)
class Run:
    """A run as its directory tells it.

    Args:
        path: The directory.
        manifest: ``manifest.json``.
        settings: ``config.json``; empty if there is none.
        curves: One per stage that has begun, in their order.
        evaluation: ``evaluation/results.json``; None if there is none that can be read.
        audit: ``audit.json``; empty if there is none.
        problems: What could not be read, a sentence each.
    """

    path: Path
    manifest: dict[str, Any]
    settings: dict[str, Any]
    curves: list[Curve]
    evaluation: EvaluationResult | None
    audit: dict[str, Any]
    problems: list[str]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.resolve().name or str(self.path)

    @property
    def status(self) -> str:
        """What the manifest says; "killed" for a running one whose process is no more."""
        told = str(self.manifest.get("status"))
        return "killed" if told == "running" and holder_lives(self.path) is False else told

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What every finished stage said at its end."""
        return [curve.row for curve in self.curves if curve.row]

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The rows of student blocks, by block."""
        found = {int(row["block"]): row for row in self.rows if is_count(row.get("block"))}
        return [found[block] for block in sorted(found)]

    @property
    def layer_map(self) -> dict[int, int]:
        """Student block to teacher block, of the blocks whose stage is done."""
        return {
            int(row["block"]): int(row["teacher_block"])
            for row in self.blocks
            if is_count(row.get("teacher_block"))
        }


def is_count(value: object) -> bool:
    """Whether a value of a file is a whole number of 0 or more, and one that can count."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def number(value: object) -> float:
    """A value of a file as a number; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < LARGEST else math.nan


def numbers(value: object) -> list[float]:
    """A list of a file as numbers; empty for anything else."""
    return [number(item) for item in value] if isinstance(value, list) else []


def group(value: object) -> dict[str, Any]:
    """A value of a file that should be an object; empty for anything else."""
    return value if isinstance(value, dict) else {}


def groups(value: object) -> list[dict[str, Any]]:
    """A list of a file that should hold objects; what is none is empty."""
    return [group(item) for item in value] if isinstance(value, list) else []


def read_run(path: str | Path) -> Run:
    """Read a run.

    Raises:
        InputError: If the folder holds no run.
        CheckpointError: If its manifest was changed, or is of another version.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest is None:
        what = "has no manifest.json" if path.is_dir() else "is not a folder"
        raise InputError(
            f"{path} {what}, so it is not the directory of a run.",
            "Name what --output_dir of the training named.",
        )
    problems: list[str] = []
    curves = read_curves(path, problems)
    by_name = {curve.stage: curve for curve in curves}
    for row in groups(manifest.get("stages")):
        stage = str(row.get("stage"))
        if stage not in by_name:  # its metrics are gone
            by_name[stage] = Curve(stage)
            curves.append(by_name[stage])
        by_name[stage].row = row
    return Run(
        path=path,
        manifest=manifest,
        settings=_read_object(path / "config.json", problems),
        curves=curves,
        evaluation=read_evaluation(path / "evaluation" / "results.json", problems),
        audit=_read_object(path / "audit.json", problems),
        problems=problems,
    )


def is_run(path: Path) -> bool:
    """Whether there is a manifest to read."""
    return (path / MANIFEST_NAME).is_file()


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return parse_json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error}).")
        return {}


def read_evaluation(path: Path, problems: list[str]) -> EvaluationResult | None:
    """The evaluation, if every table can be made of it."""
    content = _read_object(path, problems)
    if not content:
        return None
    try:
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {content.get('format_version')!r}")
        result = cast("EvaluationResult", with_non_finite(content))
        for make in (
            tables.model_rows,
            tables.detail_table,
            tables.own_text_table,
            tables.block_table,
            tables.summary,
            own_text_sentence,
        ):
            make(result)
        for item in result["generations"]:
            "".join([item["mode"], item["prompt"], item["reference"], *item["continuations"]])
            "".join(item["continuations"].values())
        "".join(result["notes"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        problems.append(f"{path.name} is not what this version's evaluation writes ({error!r}).")
        return None
    return result


def read_curves(run_dir: Path, problems: list[str]) -> list[Curve]:
    """What the stages wrote down so far, in their order.

    Blocks that learn apart from each other write beside their own checkpoints until all are done.
    """
    curves: dict[str, Curve] = {}
    unreadable = 0
    for path in [run_dir / METRICS_NAME, *sorted(run_dir.glob(f"checkpoints/*/{METRICS_NAME}"))]:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            try:
                event = parse_json_object(line) if len(line) < MAX_LINE else {}
            except ValueError:
                event = {}
            if "event" not in event:
                unreadable += 1
            elif isinstance(event.get("stage"), str):
                _take_in(curves.setdefault(event["stage"], Curve(event["stage"])), event)
    if unreadable:
        problems.append(f"{unreadable} lines of {METRICS_NAME} cannot be read.")
    return list(curves.values())


def _take_in(curve: Curve, event: dict[str, Any]) -> None:
    loss = number(event.get("loss"))
    kind = event["event"]
    if kind == "step" and is_count(event.get("step")):
        curve.steps.append((event["step"], loss))
        curve.tokens_per_second = number(event.get("tokens_per_second"))
    elif kind == "epoch":
        curve.epochs.append(loss)
    elif kind == "validation":
        curve.validation.append(loss)
    elif kind in ("block", "head", "polish"):
        curve.row = event
        first = number(event.get("first_loss"))
        if math.isfinite(first) and (not curve.steps or curve.steps[0][0] > 1):
            curve.steps.insert(0, (1, first))


def shown(value: object) -> str:
    """A setting as a page shows it."""
    return value if isinstance(value, str) else json.dumps(value)
