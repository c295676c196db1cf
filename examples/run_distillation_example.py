"""Distil a teacher into a student from the command line.

    python -m examples.run_distillation_example

alone distils the built-in teacher on the built-in text. ``--help`` lists everything. The flags are
in ``distillation/commands/flags.py``, what is done with them in ``distil.py`` beside it.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from cleangpt.cli import run_command
from distillation.commands import distil
from distillation.commands.flags import build_parser

if TYPE_CHECKING:
    from cleangpt.data import DistillationDataCollator, TextDataset

__all__ = ["DistillationDataCollator", "TextDataset", "build_parser", "get_model_class", "main"]


def __getattr__(name: str) -> Any:
    """Give notebooks what this command is built from, without loading it for ``--help``."""
    if name in ("TextDataset", "DistillationDataCollator"):
        return getattr(importlib.import_module("cleangpt.data"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_model_class(model_type_name: str) -> Any:
    """Return the student class of that name; a kind of your own can be returned here too.

    Raises:
        ValueError: If the name is unknown.
    """
    return distil.registered(model_type_name)


def main(argv: list[str] | None = None) -> None:
    """Distil, say where the student is, and how to evaluate it.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Raises:
        CleanGPTError: For anything the user can mend; ``run_command`` prints it in two lines.
    """
    distil.main(argv, get_model_class)


if __name__ == "__main__":
    sys.exit(run_command(main))
