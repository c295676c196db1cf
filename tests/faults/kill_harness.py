"""Runs in processes of their own, signals to them, and every number of what they leave compared."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from cleangpt.runtime.faultpoints import VARIABLE

NO_RESULTS = (
    *("seconds", "tokens_per_second", "output_dir", "student_path", "metrics_bytes", "run_id"),
    *("checkpoint_steps", "files", "sha256", "metrics_sha256"),  # checksums of files with times
    "command",  # names the directory
)
"""What two equal runs may differ in."""


@dataclass(frozen=True)
class Running:
    """A process of a run, the leader of a process group.

    Args:
        pid: Its number.
        wait: Waits at most so many seconds; returns the exit code, minus the signal's number if
            one killed it, or None.
    """

    pid: int
    wait: Callable[[float], int | None]

    def signal(self, number: int, *, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            (os.killpg if group else os.kill)(self.pid, number)

    def end(self, seconds: float = 240.0) -> int:
        """The exit code, which has to come."""
        code = self.wait(seconds)
        assert code is not None, f"process {self.pid} does not end"
        return code


def start_command(words: list[str], log: Path, faults: str = "") -> Running:
    """Start a command of ours in a new interpreter.

    Args:
        words: The command after the interpreter's name.
        log: The file its output is added to.
        faults: See :mod:`cleangpt.runtime.faultpoints`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({VARIABLE: faults} if faults else {})}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )

    def wait(seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        return None

    return Running(process.pid, wait)


def start_warm(target: Callable[..., None], folder: Path, faults: str = "", **rest: Any) -> Running:
    """Fork a process from a server that has imported everything: as real, and started at once.

    Args:
        target: Called with the folder and the rest; of a module that the server has imported.
        folder: The run's; output is added to ``folder.log``.
        faults: See :mod:`cleangpt.runtime.faultpoints`.
        **rest: Passed on.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([target.__module__])
    process = context.Process(target=_begin, args=(target, folder, faults, rest))
    process.start()
    assert process.pid is not None

    def wait(seconds: float) -> int | None:
        process.join(seconds)
        return process.exitcode

    return Running(process.pid, wait)


def _begin(target: Callable[..., None], folder: Path, faults: str, rest: dict[str, Any]) -> None:
    os.setsid()
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if faults:
        os.environ[VARIABLE] = faults
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a command
    target(folder, **rest)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, itself or through others, and that live."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} does not come"
        time.sleep(0.02)


def log_of(folder: Path) -> str:
    path = folder.with_suffix(".log")
    return path.read_text(errors="replace") if path.exists() else ""


def wait_for_a_step(folder: Path, before: str) -> None:
    """Wait until a process has taken and logged a step; ``before`` is the log as it was."""
    wait_until(lambda: bool(stages_logged(folder, before)), "a step")


def stages_logged(folder: Path, before: str = "") -> list[str]:
    """The names of the stages of all steps that are in the log; ``before`` is left out of it."""
    return re.findall(r" INFO (.+) \(\d+/\d+\) step \d+/\d+: ", log_of(folder)[len(before) :])


def expected_codes(number: int) -> tuple[int, int, int]:
    """Exit codes after a signal: stopped, not yet begun (or SIGKILL), and done before it came."""
    return (128 + number, -number, 0)


# Comparing ----------------------------------------------------------------------------------------


def differences(one: Path, other: Path) -> list[str]:
    """Everything in which two finished runs differ, times apart; also what has no place there."""
    found = [
        f"{name} {tensor}"
        for name, read in TENSOR_FILES.items()
        for tensor in different_tensors(read(one / name), read(other / name))
    ]
    for name in ("manifest.json", "config.json", "audit.json", "metrics.jsonl"):
        if _numbers(one / name) != _numbers(other / name):
            found.append(name)
    left = [path.name for path in other.iterdir() if path.name in ("checkpoints", "activations")]
    return found + left + [path.name for path in other.rglob("*.tmp")]


def tensors_in(folder: Path) -> int:
    """How many tensors of a finished run :func:`differences` compares."""
    return sum(len(read(folder / name)) for name, read in TENSOR_FILES.items())


def different_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bytes."""
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or _bits(one[name]) != _bits(other[name])
    ]


def different_checkpoints(one: Path, other: Path) -> list[str]:
    """In what two checkpoints of the same place differ: weights, optimizers, sums, counters."""
    name = "tensors.safetensors"
    found = different_tensors(load_file(one / name), load_file(other / name))
    if _numbers(one / "state.json") != _numbers(other / "state.json"):
        found.append("state.json")
    return found


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run that was stopped."""
    return max((folder / "checkpoints").glob("step-*"))


def _state_of_pt(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["model_state_dict"]
    return state


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tensor.shape, raw


def _numbers(path: Path) -> str:
    """The JSON of a file, times and names of the run left out."""
    texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return repr([_timeless(json.loads(text)) for text in texts])


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in NO_RESULTS}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


TENSOR_FILES: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "student_model_final_distilled.pt": _state_of_pt,
    "final/model.safetensors": load_file,
    "stitching_layers.safetensors": load_file,
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
"""What kills at random are drawn from."""
