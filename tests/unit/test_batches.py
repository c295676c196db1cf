"""The order of batches is a function of (seed, epoch)."""

import subprocess
import sys

import pytest
import torch

from cleangpt.data.batches import SeededSampler, make_dataloader
from cleangpt.errors import UsageError


def collate(items: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(items)}


class Numbers(torch.utils.data.Dataset):
    """The items 0, 1, 2, ..."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def batches_of(loader: torch.utils.data.DataLoader) -> list[list[int]]:
    return [batch["input_ids"].tolist() for batch in loader]


def test_order_depends_on_seed_and_epoch_only() -> None:
    sampler = SeededSampler(50, seed=3)
    first = list(sampler)
    torch.manual_seed(99)
    torch.rand(5)
    assert list(sampler) == first == list(SeededSampler(50, seed=3))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert sorted(second) == sorted(first) == list(range(50))
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(SeededSampler(50, seed=4)) != first
    # Seed and epoch are not interchangeable.
    other = SeededSampler(50, seed=1)
    other.set_epoch(3)
    assert list(other) != second


def test_order_is_the_same_on_every_machine() -> None:
    assert list(SeededSampler(8, seed=0)) == [5, 1, 4, 2, 3, 7, 6, 0]


def test_no_shuffle_keeps_the_order() -> None:
    sampler = SeededSampler(4, shuffle=False)
    sampler.set_epoch(7)
    assert list(sampler) == [0, 1, 2, 3]
    assert list(SeededSampler(0)) == []


def test_loader_uses_the_sampler_and_keeps_the_last_batch() -> None:
    loader = make_dataloader(Numbers(10), collate, 4, seed=5)
    assert isinstance(loader.sampler, SeededSampler)
    flat = [index for batch in batches_of(loader) for index in batch]
    assert flat == list(SeededSampler(10, seed=5))
    assert [len(batch) for batch in batches_of(loader)] == [4, 4, 2]
    loader.sampler.set_epoch(1)
    assert [index for batch in batches_of(loader) for index in batch] != flat


def test_iterating_leaves_the_global_generator_alone() -> None:
    loader = make_dataloader(Numbers(10), collate, 4)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches_of(loader)
    assert torch.equal(torch.rand(3), expected)


def test_workers_give_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    alone = make_dataloader(Numbers(9), collate, 2, seed=1)
    helped = make_dataloader(Numbers(9), collate, 2, seed=1, num_workers=1)
    for epoch in range(2):
        alone.sampler.set_epoch(epoch)
        helped.sampler.set_epoch(epoch)
        assert batches_of(alone) == batches_of(helped)


@pytest.mark.slow
def test_python_ends_while_a_loader_with_workers_is_still_there() -> None:
    code = (
        "import torch; from cleangpt.data.batches import make_dataloader as make;"
        "loader = make([torch.zeros(2)] * 4, torch.utils.data.default_collate, 2, num_workers=1);"
        "print(len(list(loader)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("2\n", "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0.*\n.*--batch_size"),
        ({"batch_size": 1, "num_workers": -1}, "num_workers is -1.*\n.*--num_workers"),
    ],
)
def test_impossible_settings_are_usage_errors(settings: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_dataloader(Numbers(1), collate, **settings)
