"""Would this run work? ``python -m distillation.doctor`` with the run's flags says it first."""

import sys

from cleangpt.cli import run_command
from distillation.commands.doctor import main

if __name__ == "__main__":
    sys.exit(run_command(main))
