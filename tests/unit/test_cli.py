"""Flags, exit codes and the two lines of an error."""

import argparse
import errno
import logging
import subprocess
import sys
from collections.abc import Callable

import pytest

from cleangpt import cli
from cleangpt.errors import (
    CheckpointError,
    CleanGPTError,
    EnvironmentProblem,
    InputError,
    NonFiniteError,
    OutOfMemory,
    UsageError,
)


def parser() -> cli.CommandParser:
    made = cli.CommandParser(description="a test", prog="tool")
    made.add_argument("--batch_size", type=cli.positive_int, default=8)
    made.add_argument("--lr_per_block", type=cli.number_or_list(cli.positive_float), default=1e-3)
    cli.add_switch(made, "use_stitching_layers", "no_stitching_layers", True, "project")
    return made


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "fix"]
    return lines


@pytest.mark.parametrize(
    ("kind", "good", "value", "bad"),
    [
        (cli.positive_int, "3", 3, ["0", "-1", "1.5", "1e3", "", "nan"]),
        (cli.non_negative_int, "0", 0, ["-1", "x"]),
        (cli.positive_float, "1e-3", 1e-3, ["0", "-1", "nan", "inf", "-inf", "1e999", "x"]),
        (cli.non_negative_float, "0", 0.0, ["-0.1", "nan", "inf"]),
        (cli.probability, "0.1", 0.1, ["1", "1.5", "-0.1", "nan"]),
    ],
)
def test_number_types(
    kind: Callable[[str], float], good: str, value: float, bad: list[str]
) -> None:
    assert kind(good) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            kind(text)


def test_number_or_list() -> None:
    assert parser().parse_args(["--lr_per_block", "1e-3"]).lr_per_block == 1e-3
    assert parser().parse_args(["--lr_per_block", "1e-3, 5e-4"]).lr_per_block == [1e-3, 5e-4]


@pytest.mark.parametrize("value", ["1e-3,", ",", "1e-3,nan", "a"])
def test_bad_list_is_a_usage_error(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--lr_per_block" in refused(["--lr_per_block", value], capsys)[0]


def test_nearest_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    cause, remedy = refused(["--batch-sise=4"], capsys)
    assert cause == "error: unknown flag --batch-sise"
    assert "Did you mean --batch_size?" in remedy
    assert "--help" in remedy


def test_abbreviations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch" in refused(["--batch", "4"], capsys)[0]


def test_stray_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["stray"], capsys)[0] == "error: unknown argument stray"


def test_bad_value_names_flag_and_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        "--batch_size: '0' is not a whole number of 1 or more"
        in refused(["--batch_size", "0"], capsys)[0]
    )


def test_switch_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    assert parser().parse_args([]).use_stitching_layers is True
    assert parser().parse_args(["--use_stitching_layers"]).use_stitching_layers is True
    assert parser().parse_args(["--no_stitching_layers"]).use_stitching_layers is False
    refused(["--use_stitching_layers", "--no_stitching_layers"], capsys)
    off = cli.CommandParser(prog="tool")
    cli.add_switch(off, "--plot", "--no_plot", False, "draw")
    assert off.parse_args([]).plot is False
    assert off.parse_args(["--plot"]).plot is True


def raising(error: BaseException) -> Callable[[list[str] | None], None]:
    def main(argv: list[str] | None) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("cause", "remedy"), 2),
        (InputError("cause", "remedy"), 3),
        (CheckpointError("cause", "remedy"), 4),
        (EnvironmentProblem("cause", "remedy"), 5),
        (NonFiniteError("cause", "remedy"), 6),
        (OutOfMemory("cause", "remedy"), 7),
        (CleanGPTError("cause", "remedy"), 1),
        (MemoryError(), 7),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 7),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), 7),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 7),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), 5),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 5),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 5),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 5),
        (KeyboardInterrupt(), 130),
        (KeyError("x"), 1),
        (RuntimeError("two\nlines"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(raising(error), []) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["error", "fix"]


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:34019: Connection reset by peer.",
        "[Rank 1] Watchdog caught collective operation timeout: NCCL communicator was aborted",
    ],
)
def test_a_process_that_lost_another_says_so(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(raising(RuntimeError(text)), []) == 5
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause.startswith("error: another process of this run has died, or does not answer: ")
    assert "--resume" in remedy


def test_our_own_words_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run_command(raising(InputError("the cause.", "The remedy.")), [])
    assert capsys.readouterr().err == "error: the cause.\nfix: The remedy.\n"


def test_debug_shows_the_traceback_and_keeps_the_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run_command(raising(InputError("cause", "remedy")), ["--debug"]) == 3
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert captured.endswith("error: cause\nfix: remedy\n")


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (2, 2), ("words", 1)])
def test_system_exit_keeps_its_code(
    code: str | int | None, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command(raising(SystemExit(code)), []) == expected
    assert capsys.readouterr().err == ("words\n" if code == "words" else "")


def test_success_passes_the_arguments_on() -> None:
    seen: list[list[str] | None] = []
    assert cli.run_command(seen.append, ["--a"]) == 0
    assert cli.run_command(seen.append) == 0
    assert seen == [["--a"], None]


def test_setup_logging_replaces_its_handler(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        cli.setup_logging()
        cli.setup_logging(debug=False)
        logging.getLogger("cleangpt.x").info("seen")
        logging.getLogger("cleangpt.x").debug("hidden")
        logging.getLogger("other").info("hidden")
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("seen") == 1
        assert "hidden" not in captured.err
        cli.setup_logging(debug=True)
        logging.getLogger("distillation").debug("shown")
        assert "shown" in capsys.readouterr().err
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
        for name in cli._OUR_LOGGERS:
            logging.getLogger(name).setLevel(logging.NOTSET)


def test_a_closed_pipe_is_quiet() -> None:
    code = (
        "import sys; from cleangpt.cli import run_command\n"
        "sys.exit(run_command(lambda argv: print('x\\n' * 200000), []))"
    )
    command = f'{sys.executable} -c "$CODE" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        env={"CODE": code, "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 141
    assert done.stderr == ""


def test_importing_the_module_loads_nothing_heavy() -> None:
    code = (
        "import sys, cleangpt.cli\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("started", "shown"),
    [
        ("/usr/bin/cleangpt-doctor", "cleangpt-doctor"),
        ("cleangpt-doctor.exe", "cleangpt-doctor"),
        ("/x/distillation/doctor.py", "python -m distillation.doctor"),
    ],
)
def test_messages_name_the_command_as_it_was_started(
    started: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert cli.program_name("distillation.doctor") == shown


def test_what_is_quiet_for_a_while_speaks_again() -> None:
    own = logging.getLogger("quiet.for.a.while")
    own.setLevel(logging.INFO)
    with cli.only_warnings("quiet.for.a.while"):
        assert not own.isEnabledFor(logging.INFO)
    assert own.isEnabledFor(logging.INFO)
