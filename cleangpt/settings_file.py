"""Flags in a YAML file: the same names, the same types, the same refusals.

``--config run.yaml`` gives what no flag names, ``--print_config`` shows what both come to. A value
is read as its flag would read it, so a file can hold nothing that a command line cannot. Only plain
YAML is read (scalars, and lists of them): no object is ever built from a file.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cleangpt.cli import CommandParser, nearest_names
from cleangpt.errors import UsageError

FLAG, FILE, DEFAULT = "flag", "file", "default"
OF_THE_CALL = frozenset({"help", "config", "print_config", "resume", "overwrite", "plan", "debug"})
"""What belongs to one call and not to what it does: never printed."""
_NEVER_IN_A_FILE = frozenset({"help", "config", "print_config"})
_MAX_BYTES = 1_000_000
_KINDS = ("str", "int", "float", "bool", "null", "timestamp")


def add_config_flags(parser: CommandParser) -> None:
    """Add ``--config`` and ``--print_config``."""
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of flags; those given win (default: none)"
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print all settings as such a file, with where each is from, and end (default: off)",
    )


def parse_settings(
    parser: CommandParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parse flags and the file that ``--config`` names.

    Args:
        parser: Has the flags of :func:`add_config_flags`.
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        All settings, and where those that were given are from: :data:`FLAG` or :data:`FILE`.

    Raises:
        UsageError: If the file cannot be read, or has a name or a value that no flag has.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    required = [action for action in parser._actions if action.required]
    for action in required:  # the file may have it
        action.required = False
    arguments = parser.parse_args(words)
    origins = dict.fromkeys(_given(parser, words), FLAG)
    if arguments.config is not None:
        excluded = {
            action.dest
            for group in parser._mutually_exclusive_groups
            if any(action.dest in origins for action in group._group_actions)
            for action in group._group_actions
        }
        for name, value in read_settings(Path(arguments.config), parser).items():
            if name not in origins and name not in excluded:
                setattr(arguments, name, value)
                origins[name] = FILE
    for action in required:
        action.required = True
        if action.dest not in origins:
            parser.error(f"the following arguments are required: {action.option_strings[0]}")
    return arguments, origins


def read_settings(path: Path, parser: CommandParser) -> dict[str, Any]:
    """The settings in a file, as the parser's flags read them.

    Raises:
        UsageError: Naming file and line.
    """
    found: dict[str, Any] = {}
    for key, node in _entries(path):
        place = f"{path}, line {key.start_mark.line + 1}"
        name = key.value
        actions = [a for a in parser._actions if a.dest == name and name not in _NEVER_IN_A_FILE]
        if not actions:
            raise _unknown(place, name, parser)
        if name in found:
            raise UsageError(f"{place}: {name} stands there twice.", "Leave one of them out.")
        value = _plain(node, actions, place)
        if isinstance(value, bool):
            found[name] = value
        elif value is not None:
            found[name] = _converted(parser, actions[0], value, place)
    for group in parser._mutually_exclusive_groups:
        both = sorted({a.dest for a in group._group_actions if found.get(a.dest)})
        if len(both) > 1:
            raise UsageError(f"{path}: {' and '.join(both)} exclude each other.", "Keep one.")
    return found


def written_settings(path: Path) -> dict[str, str]:
    """The single values in a file as they are written there, whatever command they are of.

    Raises:
        UsageError: If the file cannot be read.
    """
    return {
        key.value: node.value
        for key, node in _entries(path)
        if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null"
    }


def settings_text(settings: Mapping[str, Any], origins: Mapping[str, str], about: str) -> str:
    """The settings as a file for ``--config``.

    Args:
        settings: By name; those of one call are left out.
        origins: Where each is from; :data:`DEFAULT` if it is not there.
        about: What stands above them, one line.
    """
    lines = [f"# {about}"]
    for name, value in settings.items():
        if name not in OF_THE_CALL:
            shown = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
            shown = shown.removesuffix("...\n").strip()
            lines.append(f"{name}: {shown}  # {origins.get(name, DEFAULT)}")
    return "\n".join(lines) + "\n"


def _given(parser: CommandParser, words: Sequence[str]) -> set[str]:
    """The settings that words of a command line name, whatever their values."""
    defaults = parser._defaults, [(action, action.default) for action in parser._actions]
    try:
        parser._defaults = {}
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        return set(vars(parser.parse_args(words)))
    finally:
        parser._defaults = defaults[0]
        for action, default in defaults[1]:
            action.default = default


def _entries(path: Path) -> Iterable[tuple[yaml.ScalarNode, yaml.Node]]:
    remedy = "It holds one flag per line, as lr_per_block: 2e-3; --print_config shows such a file."
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is too long for a file of settings.", remedy)
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}.",
            "Check its name; --print_config shows such a file.",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or type(error).__name__
        raise UsageError(f"{place}: no YAML ({problem}).", remedy) from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode) or not all(
        isinstance(key, yaml.ScalarNode) for key, _ in root.value
    ):
        raise UsageError(f"{path} holds no names with values.", remedy)
    entries: list[tuple[yaml.ScalarNode, yaml.Node]] = root.value
    return entries


def _unknown(place: str, name: str, parser: CommandParser) -> UsageError:
    known = sorted({action.dest for action in parser._actions} - _NEVER_IN_A_FILE)
    nearest = nearest_names(name, known)
    hint = f"Did you mean {' or '.join(nearest)}? " if nearest else ""
    return UsageError(
        f"{place}: unknown setting {name}.", f"{hint}{parser.prog} --help lists every name."
    )


def _plain(
    node: yaml.Node, actions: Sequence[argparse.Action], place: str
) -> list[str] | bool | None:
    """A switch, or the texts that the flag takes; None where the file leaves the default."""
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    known = {f"tag:yaml.org,2002:{kind}" for kind in _KINDS}
    scalars = all(isinstance(each, yaml.ScalarNode) and each.tag in known for each in items)
    if not scalars or node.tag not in {*known, "tag:yaml.org,2002:seq"}:
        raise UsageError(f"{place}: {actions[0].dest} is no plain value.", "Write a value or list.")
    if node.tag == "tag:yaml.org,2002:null":
        return None
    is_switch = actions[0].nargs == 0
    if is_switch != (node.tag == "tag:yaml.org,2002:bool"):
        wanted = "true or false" if is_switch else "a value, not true or false"
        raise UsageError(f"{place}: {actions[0].dest} is {node.value!r}.", f"It takes {wanted}.")
    if is_switch:
        return str(node.value).lower() in ("true", "yes", "on")
    texts = [str(item.value) for item in items]
    if isinstance(actions[0], argparse._AppendAction):
        return texts
    if isinstance(node, yaml.SequenceNode) and actions[0].type is None:  # a comma is part of a text
        raise UsageError(f"{place}: {actions[0].dest} is a list.", "It takes one value.")
    return [",".join(texts)]


def _converted(
    parser: CommandParser, action: argparse.Action, texts: Sequence[str], place: str
) -> Any:
    """The value that the flag makes of a text, or of one for each time it is given."""
    strict, parser.exit_on_error = parser.exit_on_error, False
    try:
        parsed, _ = parser.parse_known_args([f"{action.option_strings[0]}={t}" for t in texts])
    except argparse.ArgumentError as error:
        raise UsageError(
            f"{place}: {action.dest}: {error.message}.",
            f"{parser.prog} --help says what {action.option_strings[0]} takes.",
        ) from error
    finally:
        parser.exit_on_error = strict
    return getattr(parsed, action.dest)
