"""How this process was started, as a line that starts it again."""

import shlex
import sys
from pathlib import Path


def command_line() -> str | None:
    """The command of this process; None in a notebook, whose command says nothing of the work.

    The interpreter is named "python" and a console command by its name alone, wherever they lie.
    """
    if "ipykernel" in sys.modules:
        return None
    words = sys.orig_argv[1:]
    if not words:
        return None
    program = Path(words[0])
    if program.parent.name in ("bin", "Scripts"):
        return shlex.join([program.stem if program.suffix == ".exe" else program.name, *words[1:]])
    return shlex.join(["python", *words])
