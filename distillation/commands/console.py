"""The console commands, each with the exit code that ``python -m`` would end with."""

from cleangpt.cli import run_command


def distill() -> int:
    """``cleangpt-distill``: what ``python -m examples.run_distillation_example`` does."""
    from distillation.commands.distil import main

    return run_command(main)


def evaluate() -> int:
    """``cleangpt-evaluate``: ``python -m distillation.evaluation.evaluate_distilled_model``."""
    from distillation.evaluation.evaluate_distilled_model import main

    return run_command(main)


def report() -> int:
    """``cleangpt-report``: ``python -m distillation.report``."""
    from distillation.report.__main__ import main

    return run_command(main)


def doctor() -> int:
    """``cleangpt-doctor``: ``python -m distillation.doctor``."""
    from distillation.commands.doctor import main

    return run_command(main)
