"""The errors a user can cause, each with its cause, its remedy and a process exit code.

A message always has two lines: what was found, and what to do about it. The commands print both and
exit with ``exit_code``; in a notebook the same text is the exception's message. Each class also
derives from the built-in exception a caller would expect, so ``except ValueError`` keeps working.
"""

from typing import ClassVar

from cleangpt.safe_text import clean_message


class CleanGPTError(Exception):
    """A failure the user can act on.

    Args:
        cause: One line that states the values found and the rule they break.
        remedy: One line that says what to change, with the exact keyword or flag.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, cause: str, remedy: str) -> None:
        # Names in it may be anybody's: of columns, files, tensors.
        self.cause, self.remedy = clean_message(cause), clean_message(remedy)
        super().__init__(f"{self.cause}\n{self.remedy}")


class UsageError(CleanGPTError, ValueError):
    """A setting, or a combination of settings, that cannot work (exit code 2)."""

    exit_code = 2


class InputError(CleanGPTError, ValueError):
    """Data or a model that cannot be used (exit code 3)."""

    exit_code = 3


class CheckpointError(CleanGPTError, RuntimeError):
    """A checkpoint that is damaged, foreign, or belongs to another configuration (exit code 4)."""

    exit_code = 4


class EnvironmentProblem(CleanGPTError, RuntimeError):  # noqa: N818
    """Disk, permission, lock, missing package or unreachable hub (exit code 5)."""

    exit_code = 5


class NonFiniteError(CleanGPTError, ArithmeticError):
    """Losses or gradients that stay NaN or infinite (exit code 6)."""

    exit_code = 6


class OutOfMemory(CleanGPTError, RuntimeError):  # noqa: N818
    """Host or device memory ran out (exit code 7)."""

    exit_code = 7


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch's are plain RuntimeErrors."""
    words = ("out of memory", "not enough memory", "can't allocate", "cannot allocate")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


class Stopped(CleanGPTError, RuntimeError):  # noqa: N818
    """A signal asked the run to stop; it saved and can go on (exit code 143 or 130).

    Args:
        cause: Where it stopped.
        remedy: How to go on.
        exit_code: 128 and the signal's number.
    """

    def __init__(self, cause: str, remedy: str, exit_code: int) -> None:
        super().__init__(cause, remedy)
        self.exit_code = exit_code  # type: ignore[misc]
