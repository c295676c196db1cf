"""The threads of a run: from affinity, quota and physical cores, on small and large machines."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cleangpt.runtime import threads
from cleangpt.runtime.threads import choose_threads, cpu_quota, set_threads, usable_cores
from tests.contract.source_tree import imports_of, shipped_files


@pytest.mark.parametrize(
    ("cores", "workers", "chosen", "reason"),
    [
        (1, 0, 1, "1 usable core"),
        (1, 4, 1, "1 usable core"),
        (2, 0, 2, "2 usable cores"),
        (2, 1, 2, "2 usable cores"),
        (8, 1, 7, "8 usable cores, 1 left to loader processes"),
        (8, 8, 6, "8 usable cores, 2 left to loader processes"),
        (32, 0, 32, "32 usable cores"),
        (64, 0, 32, "64 usable cores, more do not speed up matrix products of this size"),
    ],
)
def test_defaults_by_cores(cores: int, workers: int, chosen: int, reason: str) -> None:
    assert choose_threads(cores, {}, workers) == (chosen, reason)


def test_sixty_four_cores_with_loaders() -> None:
    choice = choose_threads(64, {}, 4)
    assert choice.threads == 32
    assert "4 left to loader processes, more do not" in choice.reason
    assert choose_threads(40, {}, 10) == (30, "40 usable cores, 10 left to loader processes")


@pytest.mark.parametrize(
    ("environment", "chosen", "reason"),
    [
        ({"OMP_NUM_THREADS": "5"}, 5, "as OMP_NUM_THREADS says"),
        ({"OMP_NUM_THREADS": "48"}, 48, "as OMP_NUM_THREADS says"),
        ({"OMP_NUM_THREADS": " 3, 2 "}, 3, "as OMP_NUM_THREADS says"),
        ({"MKL_NUM_THREADS": "2", "OMP_NUM_THREADS": "3"}, 3, "as OMP_NUM_THREADS says"),
        ({"MKL_NUM_THREADS": "2"}, 2, "as MKL_NUM_THREADS says"),
        ({"OMP_NUM_THREADS": ""}, 16, "16 usable cores"),
        ({"OMP_NUM_THREADS": "0"}, 16, "16 usable cores"),
        ({"OMP_NUM_THREADS": "many"}, 16, "16 usable cores"),
    ],
)
def test_the_environment_is_obeyed(environment: dict[str, str], chosen: int, reason: str) -> None:
    assert choose_threads(16, environment) == (chosen, reason)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/of/the/host\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
        (
            "3:cpu,cpuacct:/x\n2:cpuset:/y\n0::/\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
                "cpuset/y/cpu.cfs_quota_us": "1\n",
                "cpuset/y/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            "4:cpu:/docker/1f\n",
            {"cpu/cpu.cfs_quota_us": "800000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            8.0,
        ),
    ],
)
def test_quota_of_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float | None
) -> None:
    write(tmp_path / "proc", groups)
    for name, text in files.items():
        write(tmp_path / "mount" / name, text)
    assert cpu_quota(tmp_path / "proc", tmp_path / "mount") == quota


def test_no_control_groups_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "absent", tmp_path) is None


def test_two_processors_of_one_core_are_one(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        write(tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list", f"{siblings}\n")
    assert threads._physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert threads._physical_cores({0, 2}, tmp_path) == 1
    assert threads._physical_cores({0, 1}, tmp_path) == 2


def test_without_a_topology_the_machines_cores_are_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: 4)
    assert threads._physical_cores(range(8), tmp_path) == 4
    assert threads._physical_cores(range(3), tmp_path) == 3
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: None)
    assert threads._physical_cores(range(8), tmp_path) == 8


@pytest.mark.parametrize(
    ("quota", "cores"), [(None, 64), (2.0, 2), (2.5, 3), (0.2, 1), (100.0, 64)]
)
def test_a_container_with_a_quota_on_a_large_machine(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: set(range(64)))
    monkeypatch.setattr(threads, "_physical_cores", len)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert usable_cores() == cores


def test_this_machine_has_a_core() -> None:
    assert 1 <= usable_cores() <= len(threads._allowed_cpus())


@pytest.fixture
def _threads_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_put_back")
def test_threads_are_set_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert set_threads() == "2 threads (2 usable cores)"
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert set_threads() == "1 thread (as OMP_NUM_THREADS says)"
    assert torch.get_num_threads() == 1
    assert set_threads(3) == "3 threads (as asked)"
    assert torch.get_num_threads() == 3


def test_only_commands_set_threads() -> None:
    users = {
        file.name
        for file in shipped_files()
        if any(found.module.startswith("cleangpt.runtime.threads") for found in imports_of(file))
        or "set_num_threads(" in file.text
    }
    assert {
        name for name in users if name.startswith(("cleangpt/", "distillation/", "model/"))
    } == {
        "cleangpt/runtime/threads.py",
        "distillation/commands/distil.py",
        "distillation/commands/doctor.py",
        "distillation/commands/dry_steps.py",
        "distillation/evaluation/evaluate_distilled_model.py",
        "distillation/evaluation/lm_eval.py",
    }
