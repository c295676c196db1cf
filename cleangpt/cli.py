"""What the commands share: strict flags, exit codes, and errors of two lines.

Standard library only, so ``--help`` answers at once: commands import torch and the rest inside
their ``main``. Exit codes: 0 done, 1 a defect of ours, 2 usage, 3 data or model, 4 checkpoint,
5 environment, 6 non-finite numbers, 7 memory, 130 stopped by Ctrl-C, 143 by SIGTERM, 141 the reader
of the output closed it (`... | head`).
"""

import argparse
import difflib
import errno
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import NoReturn, TypeVar

from cleangpt.errors import CleanGPTError, EnvironmentProblem, OutOfMemory, ran_out_of_memory
from cleangpt.runtime.launcher import launched
from cleangpt.runtime.stopping import Terminated, end_children, terminable
from cleangpt.safe_text import SafeFormatter, clean_message, clean_text

T = TypeVar("T")

_OUR_LOGGERS = ("cleangpt", "distillation", "model", "examples", "benchmarks", "__main__")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_OTHERS_LOST = (
    "another process of this run has died, or does not answer",
    "See what it says, and start all of them again with --resume.",
)
_LOST_PROCESSES = {
    "dataloader timed out": (
        "a process that prepares batches does not answer",
        "Start again with --num_workers 0; a distillation goes on with --resume.",
    ),
    "dataloader worker": (
        "a process that prepares batches has died",
        "Memory may have run out: lower --num_workers, and go on with --resume.",
    ),
    **dict.fromkeys(
        ("gloo/transport", "connection closed by peer", "watchdog", "ncclremoteerror"), _OTHERS_LOST
    ),
}
"""By words of PyTorch's errors about processes that are no more: cause and remedy."""


# Types of flags -----------------------------------------------------------------------------------


def _reject(text: str, rule: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")


def _whole_number(text: str, smallest: int) -> int:
    rule = f"a whole number of {smallest} or more"
    try:
        value = int(text)
    except ValueError:
        _reject(text, rule)
    return value if value >= smallest else _reject(text, rule)


def _real_number(text: str, accept: Callable[[float], bool], rule: str) -> float:
    try:
        value = float(text)
    except ValueError:
        _reject(text, rule)
    return value if math.isfinite(value) and accept(value) else _reject(text, rule)


def positive_int(text: str) -> int:
    """Return a whole number >= 1."""
    return _whole_number(text, 1)


def non_negative_int(text: str) -> int:
    """Return a whole number >= 0."""
    return _whole_number(text, 0)


def positive_float(text: str) -> float:
    """Return a finite number > 0."""
    return _real_number(text, lambda value: value > 0, "a finite number above 0")


def non_negative_float(text: str) -> float:
    """Return a finite number >= 0."""
    return _real_number(text, lambda value: value >= 0, "a finite number of 0 or more")


def probability(text: str) -> float:
    """Return a number p with 0 <= p < 1, such as a dropout rate."""
    return _real_number(
        text, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1"
    )


def number_or_list(kind: Callable[[str], T]) -> Callable[[str], T | list[T]]:
    """Return a flag type for one value or a comma-separated list, one value per block.

    Args:
        kind: The type of a single value, such as ``positive_float``.

    Example:
        >>> number_or_list(positive_float)("1e-3,5e-4")
        [0.001, 0.0005]
        >>> number_or_list(positive_float)("1e-3")
        0.001
    """

    def convert(text: str) -> T | list[T]:
        parts = [part.strip() for part in text.split(",")]
        if "" in parts:
            _reject(text, "one value or a comma-separated list such as 1e-3,5e-4")
        values = [kind(part) for part in parts]
        return values if len(values) > 1 else values[0]

    return convert


# The parser ---------------------------------------------------------------------------------------


class CommandParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that takes no abbreviations and names the nearest flag to a typo.

    A wrong command line prints one line of cause and one of remedy to stderr and exits with 2.
    """

    def __init__(self, description: str | None = None, prog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the parsed flags, or exit with 2 on anything the parser does not know."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown[0])
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print the cause and where to look, and exit with 2."""
        _print_error(message, f"{self.prog} --help lists every flag and its values.")
        raise SystemExit(2)

    def _refuse(self, argument: str) -> NoReturn:
        name = argument.split("=", 1)[0]
        known = [flag for action in self._actions for flag in action.option_strings]
        nearest = nearest_names(name, known)
        kind = "flag" if name.startswith("-") else "argument"
        hint = f"Did you mean {' or '.join(nearest)}? " if nearest and kind == "flag" else ""
        _print_error(
            f"unknown {kind} {name}", f"{hint}{self.prog} --help lists every flag and its values."
        )
        raise SystemExit(2)


@contextmanager
def only_warnings(*names: str) -> Iterator[None]:
    """Let loggers of these names say nothing below a warning meanwhile."""
    loggers = [logging.getLogger(name) for name in names]
    before = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.WARNING)
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)


def program_name(module: str) -> str:
    """What the process was started as: our console command, or ``python -m`` and the module."""
    name = PurePath(sys.argv[0]).name.removesuffix(".exe")
    return name if name.startswith("cleangpt-") else f"python -m {module}"


def nearest_names(name: str, known: Sequence[str]) -> list[str]:
    """The one that is spelt like ``name``; else up to three that have its words; else a guess.

    Args:
        name: What nobody knows.
        known: Flags, with their dashes, or names without.
    """
    # Flags are often written with a dash where ours have an underscore.
    spelled = name.lstrip("-").lower().replace("-", "_")
    words = set(spelled.split("_"))
    plain = {each.lstrip("-"): each for each in known}
    longer = [each for each in plain if words <= set(each.split("_"))]
    longer.sort(key=lambda each: not each.startswith(spelled))

    def closest(cutoff: float) -> list[str]:
        return difflib.get_close_matches(spelled, plain, n=1, cutoff=cutoff)

    return [plain[each] for each in closest(0.85) or longer[:3] or closest(0.5)]


def add_switch(
    parser: argparse.ArgumentParser, name: str, negative: str, default: bool, help: str
) -> None:
    """Add a pair of flags that turn one setting on and off; giving both is an error.

    Args:
        parser: The parser that gets the pair.
        name: The setting and the flag that turns it on, such as ``use_stitching_layers``.
        negative: The flag that turns it off, such as ``no_stitching_layers``.
        default: The value if neither is given.
        help: What the setting does when it is on.
    """
    name, negative = name.lstrip("-"), negative.lstrip("-")
    pair = parser.add_mutually_exclusive_group()
    state = "on" if default else "off"
    pair.add_argument(
        f"--{name}", dest=name, action="store_true", help=f"{help} (default: {state})"
    )
    pair.add_argument(f"--{negative}", dest=name, action="store_false", help=f"turns --{name} off")
    parser.set_defaults(**{name: default})


# Running a command --------------------------------------------------------------------------------


def setup_logging(debug: bool = False) -> None:
    """Give the process one log handler, on stderr: our messages from INFO, others' from WARNING.

    Only commands call this; the library installs no handler. A second call replaces the first. Of
    the processes of one run the first speaks; the others only warn.

    Args:
        debug: Show our DEBUG messages as well.
    """
    handler = logging.StreamHandler()
    handler.set_name("cleangpt")
    handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    for old in [each for each in root.handlers if each.get_name() == "cleangpt"]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    rank, _ = launched(os.environ)
    level = logging.WARNING if rank else logging.DEBUG if debug else logging.INFO
    for name in _OUR_LOGGERS:
        logging.getLogger(name).setLevel(level)


def _print_error(cause: str, remedy: str) -> None:
    sys.stderr.write(f"error: {clean_message(cause)}\nfix: {clean_message(remedy)}\n")
    sys.stderr.flush()


def _describe(error: BaseException) -> tuple[int, str, str]:
    """Return exit code, cause and remedy of an error that a command did not handle."""
    text = " ".join(str(error).split())
    lowered = text.lower()
    if isinstance(error, CleanGPTError):
        return error.exit_code, error.cause, error.remedy
    if ran_out_of_memory(error):
        return (
            OutOfMemory.exit_code,
            f"memory ran out: {text or 'the host could not allocate'}",
            "Lower --batch_size or --block_size, or choose a smaller student.",
        )
    for words, (cause, remedy) in _LOST_PROCESSES.items():
        if isinstance(error, RuntimeError) and words in lowered:
            return EnvironmentProblem.exit_code, f"{cause}: {text}", remedy
    number = error.errno if isinstance(error, OSError) else None
    if number in _NO_SPACE or "no space left on device" in lowered:
        return (
            EnvironmentProblem.exit_code,
            text,
            "Free some space, or write elsewhere with --output_dir.",
        )
    if number in _NO_ACCESS:
        return (
            EnvironmentProblem.exit_code,
            text,
            "Make that path readable and writable, or choose another one.",
        )
    return (
        1,
        f"{type(error).__name__}: {text}",
        "This is a defect of ours; --debug shows the traceback, please report it.",
    )


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    sys.stderr.write(f"{error.code}\n")
    return 1


def run_command(
    main: Callable[[list[str] | None], object], argv: Sequence[str] | None = None
) -> int:
    """Run a command and return its exit code; errors become two lines on stderr.

    With ``--debug`` among the arguments the traceback comes first; the exit code stays the same.

    Args:
        main: Takes the arguments (None means those of the process).
        argv: Arguments without the program's name; None takes the process's own.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        with terminable():
            main(None if argv is None else list(argv))
            sys.stdout.flush()
    except SystemExit as error:
        return _exit_code(error)
    except KeyboardInterrupt as error:
        _show_traceback(error, arguments)
        terminated = isinstance(error, Terminated)
        _print_error(
            f"stopped by {'SIGTERM' if terminated else 'Ctrl-C'}",
            "Start it again; a distillation goes on from its last checkpoint with --resume.",
        )
        return 143 if terminated else 130
    except BrokenPipeError:
        # The reader of our output has gone (`... | head`). Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        _show_traceback(error, arguments)
        code, cause, remedy = _describe(error)
        _print_error(cause, remedy)
        end_children()
        return code
    return 0


def _show_traceback(error: BaseException, arguments: Sequence[str]) -> None:
    if "--debug" in arguments:
        lines = "".join(traceback.format_exception(error))
        sys.stderr.write(clean_text(lines, 200_000))
