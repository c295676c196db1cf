"""Where states are kept, as a function of numbers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from cleangpt.runtime import memory
from cleangpt.runtime.memory import free_memory
from distillation.cache_plan import (
    free_disk,
    needed_bytes,
    plan_cache,
    positions_in,
    shown_bytes,
)

GB = 10**9


@pytest.mark.parametrize(
    ("setting", "need", "free_ram", "free_disk", "budget", "kind", "room"),
    [
        # auto: memory, else disk, else as much as memory takes
        ("auto", 4, 8, 99, None, "ram", 4),
        ("auto", 5, 8, 99, None, "disk", 49),
        ("auto", 50, 8, 99, None, "ram", 4),
        ("auto", None, 8, 99, None, "ram", 4),
        # a budget takes the place of a half, and is never more than is free
        ("auto", 5, 8, 99, 6, "ram", 6),
        ("auto", 5, 8, 99, 3, "ram", 3),
        ("auto", 20, 8, 99, 30, "disk", 30),
        ("auto", 20, 8, 10, 30, "ram", 8),
        # a choice is a choice
        ("ram", 50, 8, 99, None, "ram", 4),
        ("ram", None, 8, 99, 6, "ram", 6),
        ("disk", 1, 8, 99, None, "disk", 49),
        ("disk", 50, 8, 99, 60, "disk", 60),
        ("off", 1, 8, 99, None, "off", 0),
        ("off", None, 8, 99, 60, "off", 0),
    ],
)
def test_the_plan(
    setting: str,
    need: int | None,
    free_ram: int,
    free_disk: int,
    budget: int | None,
    kind: str,
    room: int,
) -> None:
    plan = plan_cache(setting, need, free_ram, free_disk, budget)
    assert (plan.kind, plan.budget_bytes) == (kind, room)
    assert "\n" not in plan.reason


REST = "what does not fit is computed for every batch"
HALVES = "4 GB is half of the free memory, 50 GB is half of the free disk"


@pytest.mark.parametrize(
    ("setting", "need", "budget", "reason"),
    [
        ("auto", 3, None, "in memory: 3 GB needed, 4 GB is half of the free memory"),
        ("auto", 5, None, f"on disk: 5 GB needed, {HALVES}"),
        ("auto", 60, None, f"in memory: 60 GB needed, {HALVES}; {REST}"),
        (
            "ram",
            5,
            2,
            "in memory (activation_cache=ram): 5 GB needed, 2 GB of memory allowed by"
            f" activation_cache_gb; {REST}",
        ),
        (
            "disk",
            5,
            200,
            "on disk (activation_cache=disk): 5 GB needed, 100 GB of disk is free, less than"
            " activation_cache_gb",
        ),
        (
            "auto",
            None,
            None,
            "in memory: 4 GB is half of the free memory; the data's size is not known",
        ),
        (
            "off",
            5,
            None,
            "nowhere (activation_cache=off): both models run up to the block in training for every"
            " batch",
        ),
    ],
)
def test_the_reason_has_the_numbers(
    setting: str, need: int | None, budget: int | None, reason: str
) -> None:
    need_bytes = None if need is None else need * GB
    limit = None if budget is None else budget * GB
    assert plan_cache(setting, need_bytes, 8 * GB, 100 * GB, limit).reason == reason


def test_the_need_is_one_state_of_both_models_per_position() -> None:
    assert needed_bytes(1000, [32, 16], "fp32") == 1000 * 48 * 4
    assert needed_bytes(1000, [32, 16], "bf16") == 1000 * 48 * 2


def test_positions_are_known_without_drawing_a_batch() -> None:
    class Windows(list[int]):
        block_size = 12

        def __getitem__(self, index: object) -> int:  # type: ignore[override]
            raise AssertionError("an item was drawn")

    def collate(items: list[int]) -> list[int]:
        raise AssertionError("a batch was drawn")

    windows = Windows(range(7))
    random = torch.get_rng_state()
    assert positions_in(DataLoader(windows, batch_size=2)) == 84  # type: ignore[arg-type]
    counted = SimpleNamespace(dataset=SimpleNamespace(num_tokens=50, block_size=12))
    assert positions_in(counted) == 50
    sized = SimpleNamespace(dataset=[0] * 7, collate_fn=SimpleNamespace(block_size=8))
    assert positions_in(sized) == 56
    endless = SimpleNamespace(dataset=iter(()), collate_fn=SimpleNamespace(block_size=8))
    for unknown in (endless, [{}], DataLoader([1, 2], collate_fn=collate)):  # type: ignore[arg-type]
        assert positions_in(unknown) is None
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_free_is_asked_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_disk(tmp_path / "not" / "there" / "yet") > 0
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    machine = free_memory(torch.device("cpu"))
    assert machine > 10**7
    # A container's limit counts, and files it has cached do not.
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_memory(torch.device("cpu")) == 300000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 10**7


def test_bytes_for_people() -> None:
    shown = [shown_bytes(size) for size in (0, 999, 1500, 20_000_000, 1_234_000_000, 50 * GB)]
    assert shown == ["0 bytes", "999 bytes", "1.5 kB", "20 MB", "1.23 GB", "50 GB"]
    large = [shown_bytes(size) for size in (999_499, 999_600, 83_700 * 10**12)]
    assert large == ["999 kB", "1 MB", "83.7 PB"]
