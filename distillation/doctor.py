"""Would this run work? ``python -m distillation.doctor`` with the run's flags says it first."""

import sys

from cleangpt.cli import run_command
from distillation.commands.doctor import main
from distillation.commands.flags import build_parser

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(run_command(main))
