"""How many threads PyTorch computes with: decided from the cores a process may really use.

PyTorch starts a thread per core of the machine and knows no CPU quota: a container that may use two
of 64 cores would run 64 threads that wait for each other by spinning. Only commands call
``set_threads``; a library has no business in a notebook's threads. Tokenizers need none of this:
their threads read affinity and quota themselves.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from cleangpt.runtime.launcher import on_this_machine

MAX_THREADS = 32
"""The matrix products of a student's block are small: beyond some dozens of threads each has less
to compute than the threads need to meet again."""

_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PROC = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


class ThreadChoice(NamedTuple):
    """A number of threads and why."""

    threads: int
    reason: str


def usable_cores() -> int:
    """Physical cores this process may use: of its affinity, and within its CPU quota; >= 1."""
    cores = _physical_cores(_allowed_cpus())
    quota = cpu_quota()
    # Rounded up: with 2.5 cores, a third thread gets half a core's time.
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def choose_threads(
    cores: int, environment: Mapping[str, str], num_workers: int = 0
) -> ThreadChoice:
    """Choose the threads of a run.

    Args:
        cores: Cores the process may use.
        environment: ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` there is obeyed.
        num_workers: Processes of the data loader. They get a core each, though never more than a
            quarter of all: they collate windows, a tenth of a millisecond a batch, and then wait.
    """
    for name in _ENVIRONMENT:
        # OpenMP takes a list, one number per level of nesting.
        first = environment.get(name, "").split(",")[0].strip()
        if first.isdecimal() and int(first) > 0:
            return ThreadChoice(int(first), f"as {name} says")
    for_workers = min(num_workers, cores // 4)
    free = max(1, cores - for_workers)
    parts = [f"{cores} usable core{'' if cores == 1 else 's'}"]
    if for_workers:
        parts.append(f"{for_workers} left to loader processes")
    if free > MAX_THREADS:
        parts.append("more do not speed up matrix products of this size")
    return ThreadChoice(min(free, MAX_THREADS), ", ".join(parts))


def set_threads(asked: int = 0, num_workers: int = 0) -> str:
    """Set PyTorch's threads for this process, and return what was done as words for the log.

    Args:
        asked: The number wanted; 0 chooses.
        num_workers: Processes of the data loader.
    """
    choice = (
        ThreadChoice(asked, "as asked")
        if asked
        else choose_threads(
            max(1, usable_cores() // on_this_machine(os.environ)), os.environ, num_workers
        )
    )
    torch.set_num_threads(choice.threads)
    return f"{choice.threads} thread{'' if choice.threads == 1 else 's'} ({choice.reason})"


def cpu_quota(proc: Path = _PROC, mount: Path = _CGROUPS) -> float | None:
    """How many cores' time the process's control groups allow it; None without a limit.

    Reads versions 1 and 2 (https://docs.kernel.org/admin-guide/cgroup-v2.html, "cpu.max"). A group
    is limited by all above it. Inside a container the path may name a folder of the host that is
    not there; the container's own limit is then at the top.

    Args:
        proc: The list of the process's groups.
        mount: Where the file systems of groups are.
    """
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in (mount / controllers, mount / "cpu") if controllers else (mount,):
            parts = Path(group.lstrip("/")).parts
            limits += [_limit(top.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(group: Path) -> float | None:
    """The limit of one group, in cores; None if it has none."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (group / name).read_text(encoding="utf-8").strip()
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        allowed = float(quota) / float(period)  # "max" is no number, and -1 is no limit
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return allowed if allowed > 0 else None


def _allowed_cpus() -> set[int]:
    """The logical processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: Iterable[int], root: Path = _CPUS) -> int:
    """Count cores among logical processors; two of one core share its arithmetic units."""
    cpus = set(cpus)
    try:
        siblings = {
            (root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="utf-8")
            for cpu in cpus
        }
    except OSError:
        return min(len(cpus), psutil.cpu_count(logical=False) or len(cpus))
    return len(siblings)
