"""``python -m distillation.export``."""

import sys

from cleangpt.cli import run_command
from distillation.export.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
