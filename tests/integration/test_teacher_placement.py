"""A teacher whose blocks lie elsewhere computes and teaches what it does whole."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from cleangpt.blocks import BlockStack
from cleangpt.device_maps import bytes_on, device_map, filled, listed
from cleangpt.errors import UsageError
from cleangpt.runtime.module_state import tensors_fingerprint
from cleangpt.runtime.ranks import Ranks
from cleangpt.sharding import ShardedBlocks, shard_blocks
from cleangpt.teacher import Teacher, load_teacher, load_teacher_outline
from distillation import DistillationTrainer
from distillation.activations import Activations
from distillation.batch import Batch, as_batch, rows_of
from distillation.recipes import RECIPES
from tests.builders import CONTEXT, batches, padded, tiny_student, tiny_teacher
from tests.processes import in_processes
from tests.saved_teachers import build, save

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("teachers")
    for family in ("gpt2", "llama", "gemma3", "bloom"):
        save(place / family, build(family))
    return place


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "bloom"])
@torch.no_grad()
def test_blocks_in_files_compute_the_same_bits(folder: Path, family: str) -> None:
    whole = load_teacher(str(folder / family))
    apart = load_teacher(str(folder / family), places="cpu=1,disk")
    assert {p.is_meta for p in BlockStack(apart.model).block(0).parameters()} == {False}
    assert {p.is_meta for p in BlockStack(apart.model).block(1).parameters()} == {True}
    assert apart.fingerprint == whole.fingerprint
    ids, mask = torch.randint(200, (3, 11)), torch.ones((3, 11), dtype=torch.long)
    mask[0, 8:] = 0
    one, two = BlockStack(whole.model), BlockStack(apart.model)
    states = one.block_states(ids, mask)
    for expected, found in zip(states, two.block_states(ids, mask), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(two.advance(1, states[1], ids, mask), states[2])
    assert torch.equal(two.logits(ids, mask), one.logits(ids, mask))


def trained(place: Path, teacher: Teacher) -> tuple[dict[str, Any], nn.Module]:
    """A short run with everything that reads the teacher: audit, start, store, head, polish."""
    torch.manual_seed(1)
    student = tiny_student(vocab_size=258, block_size=CONTEXT)
    settings = {**RECIPES["best"].options, "activation_cache": "disk", "precision": "fp32"}
    settings |= {"keep_activations": True, "overfit_gate": False, "early_stop_patience": 0}
    trainer = DistillationTrainer(
        teacher.model, student, None, batches(2), output_dir=place, **settings
    )
    return trainer.train(2, 1e-3, lm_head_epochs=1, polish_epochs=1), student


def test_a_teacher_in_files_teaches_the_same_student(folder: Path, tmp_path: Path) -> None:
    runs = {}
    for name, places in (("whole", None), ("apart", "disk")):
        teacher = load_teacher(str(folder / "gpt2"), places=places)
        runs[name] = trained(tmp_path / name, teacher)
    (one, first), (two, second) = runs["whole"], runs["apart"]
    for key in ("backbone_losses", "head_loss", "polish_loss"):
        assert two[key] == one[key]
    for tensor, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(other, tensor)
    manifests = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in runs]
    assert manifests[0]["teacher"] == manifests[1]["teacher"]


def test_blocks_fill_places_in_order() -> None:
    assert filled([4, 4, 4, 4], {"cuda": 9, "cpu": 5}) == ["cuda", "cuda", "cpu", "disk"]
    assert filled([4, 4], {"cpu": 3}) == ["disk", "disk"]
    assert listed("cuda=1,cpu=2", 3) == ["cuda", "cpu", "cpu"]
    found = device_map(tiny_teacher("llama"), "auto", CPU)
    assert set(found.values()) == {"cpu"}
    assert "model.layers.2" in found
    assert "lm_head" in found


def test_a_plan_counts_the_blocks_that_are_elsewhere_once(folder: Path) -> None:
    apart = load_teacher(str(folder / "gpt2"), places="cpu=1,disk").model
    outline = load_teacher_outline(str(folder / "gpt2")).model
    stack = BlockStack(outline)
    blocks = [stack.block(index) for index in range(stack.num_blocks)]
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    whole = sum(parameter.nbytes for parameter in outline.parameters())
    assert bytes_on(CPU, outline) == whole
    here = sum(parameter.nbytes for parameter in apart.parameters() if not parameter.is_meta)
    assert here == whole - sum(sizes[1:])
    outline.hf_device_map = device_map(outline, "cpu=1,disk", CPU)
    for model in (apart, outline):
        assert bytes_on(CPU, model) == here + max(sizes[1:])


@pytest.mark.parametrize("asked", ["cpu=2", "nowhere", "cpu=1,disk=1", "cpu,disk", "cpu=x", "meta"])
def test_places_that_are_none_or_too_few_are_refused(asked: str) -> None:
    with pytest.raises(UsageError, match="teacher_device_map"):
        listed(asked, 3)


def test_a_teacher_is_not_spread_over_one_process() -> None:
    with pytest.raises(UsageError, match="there is one"):
        shard_blocks(tiny_teacher(), CPU)


SETTINGS: dict[str, dict[str, Any]] = {
    "sequential": {"activation_cache": "ram"},
    "parallel_local": {"activation_cache": "off", "polish_hidden_weight": 0.5},
    "taught": {"block_inputs": "teacher", "activation_cache": "disk"},
    "mixed": {"block_inputs": "mixed", "activation_cache": "off", "hidden_state_pictures": True},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "sequential" else pytest.mark.slow) for n in SETTINGS],
)
def test_a_spread_teacher_teaches_the_same_student(name: str, tmp_path: Path) -> None:
    settings = {**SETTINGS[name], "overfit_gate": False, "precision": "fp32"}
    if name in ("sequential", "parallel_local"):
        settings["schedule"] = name
    start = {n: RECIPES["best"].options[n] for n in ("init_from_teacher", "distill_loss_type")}

    def both() -> list[Any]:
        found = []
        for place in ("whole", "spread"):
            teacher, student = tiny_teacher().requires_grad_(False), tiny_student()
            shards = shard_blocks(teacher, CPU) if place == "spread" else None
            # One row and two processes: one has none of any batch, and takes part all the same.
            trainer = DistillationTrainer(
                *(teacher, student, None, batches(3, batch_size=1)),
                output_dir=tmp_path / place,
                **{**start, **settings},
            )
            results = trainer.train(2, 1e-3, lm_head_epochs=1, polish_epochs=1)
            kept = [results[k] for k in ("backbone_losses", "head_loss", "polish_loss")]
            weights = tensors_fingerprint(student.state_dict().items())
            found.append((kept, weights, None if shards is None else shards.gathers))
        return found

    for whole, spread in in_processes(2, both):
        assert spread[:2] == whole[:2]
        assert spread[2] > 0


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    """A group of one process: what is spread and gathered, without a second one."""
    address = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Watched(Ranks):
    """One process that writes down what it is asked about its levels."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "asked", [])

    def smallest(self, number: int) -> int:
        self.asked.append(number)  # type: ignore[attr-defined]
        return number


@pytest.mark.usefixtures("_one_process")
@torch.no_grad()
def test_states_of_a_spread_teacher_are_the_same_and_blocks_are_gathered_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cleangpt import sharding

    plain, teacher = (BlockStack(tiny_teacher("llama")) for _ in range(2))
    student = BlockStack(tiny_student())
    ranks = Watched()
    shards = ShardedBlocks(teacher, ranks, CPU)
    shards.keep_for((0, 2))
    assert shards.keep_whole == 2
    monkeypatch.setitem(sharding._SHARDED, teacher.model, shards)
    states = Activations(teacher, student, 10**9)
    expected = Activations(plain, student, 10**9)
    # Of the first batch some rows are known, some are not; the second one is padded.
    raw = [*batches(1), padded(batches(1, seed=5)[0], 3)]
    both = [as_batch(one, CPU) for one in raw]
    assert_equal_states(states, expected, 0, [rows_of(both[0], [0, 2]), *both])
    assert_equal_states(states, expected, 2, both)
    assert shards.gathers == 3  # each block once: two stay whole, and one block is run at a time
    # Known rows ask for no block, unknown ones for their tokens, and no rows for nothing.
    ranks.asked.clear()  # type: ignore[attr-defined]
    states.teacher_output(2, both[0])
    states.stand_by(2, rows_of(both[0], []))
    assert shards.gathers == 3
    assert_equal_states(states, expected, 2, [as_batch(batches(1, seed=9)[0], CPU)])
    assert ranks.asked == [3, 3, -1]  # type: ignore[attr-defined]
    assert shards.gathers == 6


def assert_equal_states(
    found: Activations, expected: Activations, block: int, some: list[Batch]
) -> None:
    for batch in some:
        one, two = (each.teacher_output(block, batch) for each in (expected, found))
        assert torch.equal(batch.valid(two), batch.valid(one))


@pytest.mark.usefixtures("_one_process")
def test_blocks_that_learn_apart_cannot_share_a_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cleangpt import sharding

    teacher = tiny_teacher()
    spread = ShardedBlocks(BlockStack(teacher), Ranks(), CPU)
    monkeypatch.setitem(sharding._SHARDED, teacher, spread)
    with pytest.raises(UsageError, match="spread over all"):
        DistillationTrainer(
            *(teacher, tiny_student(), None, batches()),
            output_dir=tmp_path / "run",
            schedule="decoupled",
            block_inputs="teacher",
        )


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("narrower", [False, True])
def test_a_student_of_a_spread_teachers_family_inherits_the_same(narrower: bool) -> None:
    """FSDP2 gives its blocks a class of their own and shards in place of tensors."""
    from distillation.teacher_init import init_from_teacher

    basis = torch.eye(32)[:, :16] if narrower else None
    changes = {"hidden_size": 16, "head_dim": 8} if narrower else {}
    found = []
    for is_spread in (False, True):
        teacher, student = tiny_teacher("llama"), tiny_teacher("llama", seed=8, **changes)
        if is_spread:
            ShardedBlocks(BlockStack(teacher), Ranks(), CPU)
        stacks = BlockStack(teacher), BlockStack(student)
        lines = init_from_teacher(*stacks, range(3), "pca", basis)
        found.append((lines, tensors_fingerprint(student.state_dict().items())))
    assert found[0] == found[1]
    assert not any(line.startswith("not taken: blocks") for line in found[0][0])
