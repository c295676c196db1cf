"""The audit that a run wrote of its teacher's hidden states, as a table of the report."""

import logging
from pathlib import Path

from cleangpt.errors import CheckpointError
from cleangpt.integrity import parse_json_object
from cleangpt.manifest import check_listed
from distillation.audit_text import audit_table

logger = logging.getLogger(__name__)

AUDIT_NAME = "audit.json"
AUDIT_TITLE = "The teacher's hidden states"
AUDIT_SENTENCE = (
    "Raw block outputs on training text, before the student learned. A floor is the least relative "
    "error that a linear read-out of so many channels can reach: of states normalised per token "
    "and channel, and of raw ones. A channel is massive where a value is a hundred times the "
    "median magnitude; such channels rule a plain squared error."
)
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def read_audit(run_dir: Path) -> Table | None:
    """Return columns and rows, or None where the run has no audit, or none that can be read."""
    path = run_dir / AUDIT_NAME
    if not path.is_file():
        return None
    try:
        check_listed(run_dir, AUDIT_NAME)
        audit = parse_json_object(path.read_bytes())
        return audit_table(audit, int(audit["student_width"]))
    except CheckpointError as error:
        logger.warning("%s The report goes without the audit.", error.cause)
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        logger.warning("%s is not an audit (%r): the report goes without it.", path, error)
        return None
