"""What a command line, a file and a recipe come to together."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cleangpt.cli import CommandParser
from cleangpt.errors import UsageError
from cleangpt.settings_file import FILE, FLAG, parse_settings, read_settings, settings_text
from distillation.commands.flags import PROGRAM, build_parser, method_flags
from distillation.commands.student_flags import check_student_flags, keep_own_weights
from distillation.recipes import RECIPES

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str] | None, module: str = PROGRAM) -> argparse.Namespace:
    """Parse the flags and their file, and let the recipe decide what neither names.

    Without ``--recipe`` that is "best", or "tutorial" once a setting of the method is given: who
    sets the tutorial's flags means its algorithm. What all of it comes to is in ``settings_text``,
    as a file for ``--config``.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
        module: What ``python -m`` starts, for the messages.
    """
    parser = build_parser(module)
    arguments, origins = parse_settings(parser, argv)
    method = method_flags()
    named = set(origins)
    check_student_flags(arguments, {name for name in named if is_changed(parser, arguments, name)})
    chosen = arguments.recipe or ("tutorial" if named & method else "best")
    arguments.recipe = chosen
    # A run's own config.yaml names every setting; the file its recipe was may be gone by then.
    needed = {name for name in method - named if parser.get_default(name) is not None}
    kind = arguments.student_model_type
    values = (
        recipe_settings(chosen, parser, kind) if needed or origins.get("recipe") == FLAG else {}
    )
    if origins.get("recipe") == FLAG and not set(values) - named:
        logger.warning("--recipe %s decides nothing: all it says is named otherwise.", chosen)
    for name, value in values.items():
        if name not in named:
            setattr(arguments, name, value)
            origins[name] = f"recipe {chosen}"
    before = vars(arguments).copy()
    keep_own_weights(arguments, named)
    for name, value in before.items():
        if getattr(arguments, name) != value:
            origins[name] = "the student has weights"
    own = sorted(name for name in method - {"recipe"} if origins.get(name) == FLAG)
    written = sum(origins.get(name) == FILE for name in method - {"recipe"})
    logger.info(
        "Recipe %s: %s. %s%s",
        chosen,
        ", ".join(f"{name}={getattr(arguments, name)}" for name in values) or "all from a file",
        f"{written} of its settings from {arguments.config}. " if written else "",
        f"Named by flags: {', '.join(own)}." if own else "No flag changes it.",
    )
    about = f"Settings of {parser.prog}; flags win over those of --config FILE."
    arguments.settings_text = settings_text(vars(arguments), origins, about)
    return arguments


def is_changed(parser: CommandParser, arguments: argparse.Namespace, name: str) -> bool:
    """Whether a setting is not its flag's default: a file may name all that there are."""
    return bool(getattr(arguments, name) != parser.get_default(name))


def recipe_settings(name: str, parser: CommandParser, kind: str) -> dict[str, Any]:
    """What a recipe sets for a kind of student: one of ours, or a file of one's own.

    Raises:
        UsageError: If there is none of that name, or it has what is not of the method.
    """
    if name in RECIPES:
        return RECIPES[name].settings_for(kind)
    if not Path(name).is_file():
        raise UsageError(
            f"There is no recipe {name}.",
            f"Name {' or '.join(RECIPES)}, or a YAML file of such settings.",
        )
    values = read_settings(Path(name), parser)
    foreign = sorted(set(values) - (method_flags() - {"recipe"}))
    if foreign:
        raise UsageError(
            f"{name}: {', '.join(foreign)} is nothing a recipe says.",
            "It says how a student learns; give the rest by flags or --config.",
        )
    return values
