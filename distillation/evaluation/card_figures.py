"""The figures of an evaluation, for the card of the student that a run has left."""

import logging
import math
from pathlib import Path

from cleangpt.errors import EnvironmentProblem
from cleangpt.manifest import read_manifest
from distillation.evaluation import tables
from distillation.evaluation.loading import CHECKPOINT_NAME
from distillation.evaluation.results import EvaluationResult
from distillation.model_card import Figures, write_card

logger = logging.getLogger(__name__)


def figures_of(result: EvaluationResult) -> Figures:
    """What of a result stands on a card."""
    data, perplexity = result["data"], result["models"][1]["quality"]["perplexity"]
    sentences = (
        f"{tables.summary(result)} Text: {data['name']} ({data['split']}), {data['num_tokens']:,}"
        f" tokens in windows of {data['seq_len']}, stride {data['stride']}."
    )
    return Figures(
        columns=tables.MODEL_COLUMNS,
        rows=tables.model_rows(result),
        sentences=sentences,
        perplexity=perplexity if math.isfinite(perplexity) else None,
        text=(data["name"], data["split"]),
    )


def refresh_card(result: EvaluationResult, source: str, run_dir: Path) -> Path | None:
    """Write the figures on the card of a run's finished student.

    A card that cannot be written is a warning: by then the report is.

    Args:
        result: What the evaluation found.
        source: Where the evaluated student was loaded from; only a run's result has a card.
        run_dir: The run.

    Returns:
        The card; None if there is none to write.
    """
    manifest = read_manifest(run_dir) if Path(source).name in ("final", CHECKPOINT_NAME) else None
    if manifest is None or manifest.get("status") != "done":
        return None
    try:
        return write_card(run_dir, manifest, figures_of(result))
    except EnvironmentProblem as error:
        logger.warning("The student's card was not refreshed: %s", error.cause)
        return None
