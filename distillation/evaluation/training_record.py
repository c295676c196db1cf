"""What a run wrote down about its blocks: what each learnt from, and how far it came.

Reads the manifest alone. A block that did not learn has no figure, nor has one of a run that is not
there.
"""

import math
from pathlib import Path
from typing import Any

from cleangpt.integrity import parse_json_object
from distillation.evaluation.results import EvaluationResult


def local_errors(run_dir: Path) -> dict[int, float]:
    """The relative error of each block at the end of its stage, on the inputs it learnt from.

    Args:
        run_dir: The run's directory.

    Returns:
        Student block to error; empty if the run tells nothing.
    """
    try:
        stages: Any = _manifest(run_dir)["stages"]
        rows = [row for row in stages if row.get("block") is not None and row.get("steps")]
        known = [row for row in rows if isinstance(row["relative_error"], int | float)]
        found = {int(row["block"]): float(row["relative_error"]) for row in known}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return {}
    return {block: error for block, error in found.items() if math.isfinite(error)}


def saved_layer_map(run_dir: Path) -> tuple[int, ...] | None:
    """The teacher block of each student block; None if the run tells nothing.

    Args:
        run_dir: The run's directory.
    """
    try:
        found = _manifest(run_dir)["layer_map"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    known = isinstance(found, list) and found and all(type(block) is int for block in found)
    return tuple(found) if known else None


def _manifest(run_dir: Path) -> dict[str, Any]:
    return parse_json_object((run_dir / "manifest.json").read_bytes())


def add_local_errors(result: EvaluationResult, errors: dict[int, float]) -> None:
    """Put them beside the errors of the chain, which the evaluation measured."""
    hidden = result["hidden_states"]
    for block in [] if hidden is None else hidden["blocks"]:
        block["local_error"] = errors.get(block["student_block"])
