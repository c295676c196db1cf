"""States in files: the same training as from memory, refused when foreign, gone when it ends."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cleangpt.blocks import BlockStack
from cleangpt.errors import CheckpointError, UsageError
from cleangpt.run_directory import RunDirectory
from distillation import DistillationTrainer
from distillation.activations import Activations
from distillation.batch import as_batch as to_batch
from distillation.config import DistillationConfig
from distillation.disk_store import HEADER_BYTES
from distillation.head_init import untie_lm_head
from distillation.trainers import HeadDistillationTrainer
from tests.builders import (
    VANILLA_FIRST,
    backbone_trainer,
    batches,
    padded,
    tiny_student,
    tiny_teacher,
    unchanged,
    weights_of,
)

TEACHER_ROW, STUDENT_ROW = 12 * 32 * 4, 12 * 16 * 4
"""Bytes of a window of the tiny models in float32."""


def as_batch(raw: dict[str, Tensor]) -> Any:
    return to_batch(raw, torch.device("cpu"))


def models(teacher: Any = None, student: Any = None) -> Activations:
    teacher = tiny_teacher() if teacher is None else teacher
    student = tiny_student().eval() if student is None else student
    return Activations(BlockStack(teacher), BlockStack(student), 0)


def opened(activations: Activations, folder: Path, precision: str = "fp32", **options: Any) -> Any:
    config = DistillationConfig(**{"activation_cache": "disk", "keep_activations": True, **options})
    return activations.opened(config, folder, None, precision)


def read(activations: Activations, level: int = 1) -> list[Tensor]:
    data = [as_batch(raw) for raw in batches()]
    return [activations.teacher_output(level, batch) for batch in data] + [
        activations.student_input(level, batch) for batch in data
    ]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def blocks_run(model: Any) -> list[int]:
    """The batch size of every run of a block, as it happens."""
    sizes: list[int] = []
    stack = BlockStack(model)

    def count(module: Any, args: Any, output: Tensor) -> None:
        if output.shape[1] > 2:  # two tokens are a look at the model's structure
            sizes.append(len(output))

    for index in range(stack.num_blocks):
        # Only what runs in earnest: blocks that are bypassed do not reach their parts.
        part = next(iter(stack.block(index).children()))
        part.register_forward_hook(count)
    return sizes


def train(place: Path, student: Any = None, data: Any = None, **options: Any) -> Any:
    trainer = DistillationTrainer(
        tiny_teacher(),
        tiny_student() if student is None else student,
        None,
        batches() if data is None else data,
        output_dir=place,
        **options,
    )
    return trainer.train(2, 1e-2, lm_head_epochs=2, lm_head_lr=1e-2)


@pytest.mark.parametrize("kind", VANILLA_FIRST)
def test_a_run_has_the_same_bits_from_disk_from_memory_and_without(
    tmp_path: Path, kind: str
) -> None:
    trained, losses = [], []
    for cache in ("disk", "ram", "off"):
        student = tiny_student(kind)
        results = train(tmp_path / cache, student, activation_cache=cache, precision="fp32")
        trained.append(weights_of(student))
        losses.append((results["backbone_losses"], results["head_loss"]))
    assert losses[0] == losses[1] == losses[2]
    assert unchanged(trained[0], trained[1]) == unchanged(trained[0], trained[2]) == {*trained[0]}


def test_padded_windows_come_back_from_disk_bit_for_bit(tmp_path: Path) -> None:
    data = [
        as_batch(padded(raw, 1 + n, side))
        for n, (raw, side) in enumerate(zip(batches(2), ("left", "right"), strict=True))
    ]
    streamed, kept = models(), models()
    with opened(kept, tmp_path):
        for level in (0, 1, 1, 2):
            for batch in data:
                wanted = batch.valid(streamed.teacher_output(level, batch))
                assert torch.equal(batch.valid(kept.teacher_output(level, batch)), wanted)


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_bf16_states_are_close_and_half_the_size(tmp_path: Path, cache: str) -> None:
    exact = train(tmp_path / "exact", activation_cache=cache, precision="fp32")
    options = {"activation_cache": cache, "activation_dtype": "bf16", "precision": "fp32"}
    rounded = train(tmp_path / "rounded", **options)
    for name in ("backbone_losses", "head_loss"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.02)
        assert rounded[name] != exact[name]
    activations = models()
    with opened(activations, tmp_path / "states", keep_activations=False, **options):
        first, second = read(activations), read(activations)
        assert activations.bytes_kept == 16 * (TEACHER_ROW + STUDENT_ROW) // 2
    assert {state.dtype for state in second} == {torch.float32}
    assert equal(second, [state.bfloat16().float() for state in first])


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_the_budget_holds_and_rows_outside_of_it_are_streamed(tmp_path: Path, cache: str) -> None:
    teacher = tiny_teacher()
    activations, streamed = models(teacher), models()
    runs = blocks_run(teacher)
    ids = torch.cat([raw["input_ids"] for raw in batches()])
    mixed = [as_batch({"input_ids": ids[start::4]}) for start in range(4)]
    limit = 6 * TEACHER_ROW
    options = {"activation_cache": cache, "activation_cache_gb": limit / 1e9}
    with opened(activations, tmp_path, keep_activations=False, **options):
        for raw in batches():
            activations.teacher_output(0, as_batch(raw))
        for level in (1, 2):
            del runs[:]
            for batch in mixed:  # each has known windows and others
                torch.testing.assert_close(
                    activations.teacher_output(level, batch), streamed.teacher_output(level, batch)
                )
                assert activations.bytes_kept == limit
            # The six known windows move on by one block; the ten others run all of them.
            assert sum(runs) == 6 + 10 * (level + 1)
        if cache == "disk":
            assert (tmp_path / "teacher.states").stat().st_size == HEADER_BYTES + limit


def test_files_do_not_grow_with_levels_and_go_with_the_run(tmp_path: Path) -> None:
    trainer = backbone_trainer(tmp_path, activation_cache="disk")
    folder = trainer.run.path / "activations"
    sizes: list[tuple[int, int]] = []
    trainer.after_epoch = lambda stage, epoch: sizes.append(
        tuple((folder / f"{name}.states").stat().st_size for name in ("teacher", "student"))
    )
    trainer.train_backbone(2, 1e-2)
    full = (HEADER_BYTES + 16 * TEACHER_ROW, HEADER_BYTES + 16 * STUDENT_ROW)
    # Block 0 learns with the embeddings, so its inputs are not kept.
    assert sizes == [(full[0], HEADER_BYTES)] * 2 + [full] * 2
    assert not folder.exists()


@pytest.mark.parametrize("keep", [False, True])
def test_after_an_exception_only_kept_files_stay(tmp_path: Path, keep: bool) -> None:
    class Broken(list[Any]):
        epochs = 0

        def __iter__(self) -> Iterator[Any]:
            self.epochs += 1
            yield from list.__iter__(self)
            if self.epochs == 3:
                raise RuntimeError("the disk of the data was pulled out")

    options = {"activation_cache": "disk", "keep_activations": keep, "audit_tokens": 0}
    with pytest.raises(RuntimeError, match="pulled out"):
        train(tmp_path / "run", data=Broken(batches()), **options)
    folder = tmp_path / "run" / "activations"
    assert folder.exists() == keep
    if keep:
        names = {"teacher.states", "teacher.json", "student.states", "student.json"}
        assert {path.name for path in folder.iterdir()} == names


def test_kept_files_belong_to_the_run_and_go_with_overwrite(tmp_path: Path) -> None:
    options = {"activation_cache": "disk", "keep_activations": True}
    train(tmp_path, **options)
    assert (tmp_path / "activations" / "teacher.states").is_file()
    for name in ("manifest.json", "config.json", "metrics.jsonl"):
        assert (tmp_path / name).is_file()
    with pytest.raises(UsageError, match="already holds a run .*activations"):
        train(tmp_path)
    train(tmp_path, overwrite=True)
    assert not (tmp_path / "activations").exists()


def test_a_trainer_in_the_same_run_reads_what_was_kept(tmp_path: Path) -> None:
    def head_losses(cache: str) -> tuple[Any, list[int]]:
        teacher, student = tiny_teacher(), tiny_student()
        options: dict[str, Any] = {"activation_cache": cache, "precision": "fp32"}
        options["keep_activations"] = cache == "disk"
        run = RunDirectory(tmp_path / cache)
        backbone = backbone_trainer(tmp_path / "unused", student, **options)
        head = HeadDistillationTrainer(teacher, student, None, batches(), **options)
        backbone.run = head.run = run
        runs = blocks_run(teacher)
        with run.opened({}):
            backbone.train_backbone(1, 1e-2)
            return head.train_head(2, 1e-2)["head_loss"], runs

    (kept, kept_runs), (streamed, streamed_runs) = head_losses("disk"), head_losses("off")
    assert kept == streamed
    # Two student blocks learnt from teacher blocks 1 and 2, so the last states were there.
    assert sum(kept_runs) == 0 < sum(streamed_runs)


def test_kept_states_are_read_again_and_no_block_runs(tmp_path: Path) -> None:
    first = models()
    with opened(first, tmp_path):
        states = read(first)
    again = models()
    runs = blocks_run(again.teacher.model), blocks_run(again.student.model)
    with opened(again, tmp_path):
        assert equal(read(again), states)
        assert runs == ([], [])
        read(again, 2)
        assert [sum(sizes) for sizes in runs] == [16, 16]
    assert first.bytes_kept == again.bytes_kept == 0


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: models(tiny_teacher(seed=9)), {}, "teacher.states .*block 2 from other weights"),
        (lambda: models(student=tiny_student(seed=9)), {}, "student.states .*block 1 from other"),
        (lambda: models(tiny_teacher(n_embd=16)), {}, "d_state=32, and this run 16"),
        (models, {"activation_dtype": "bf16"}, "dtype='float32', and this run 'bfloat16'"),
        (models, {"precision": "bf16"}, "precision='fp32', and this run 'bf16'"),
    ],
)
def test_kept_states_of_another_run_are_refused_and_left_alone(
    tmp_path: Path, make: Any, options: dict[str, Any], words: str
) -> None:
    first = models()
    with opened(first, tmp_path):
        read(first)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for keep in (True, False):
        with (
            pytest.raises(CheckpointError, match=words) as error,
            opened(make(), tmp_path, keep_activations=keep, **options),
        ):
            pass
    assert error.value.exit_code == 4
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_what_a_state_depends_on_must_be_the_same(tmp_path: Path) -> None:
    student = tiny_student().eval()
    first = models(student=student)
    with opened(first, tmp_path):
        states = read(first)
    assert untie_lm_head(first.student)
    with torch.no_grad():
        student.lm_head.weight.mul_(2.0)
        BlockStack(student).final_norm.weight.mul_(2.0)
        next(student.blocks[1].parameters()).mul_(2.0)  # runs after the states that are kept
    again = models(student=student)
    with opened(again, tmp_path):
        assert equal(read(again), states)


def test_damaged_rows_are_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = models()
    with opened(first, tmp_path):
        states = read(first)
    path = tmp_path / "teacher.states"
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + TEACHER_ROW * 5 + 77] ^= 4
    path.write_bytes(content)
    again = models()
    runs = blocks_run(again.teacher.model)
    with opened(again, tmp_path):
        assert equal(read(again), states)
        assert runs == [4, 4]  # the batch of that row, through two blocks
        assert equal(read(again), states)
        assert runs == [4, 4]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [str(path) in warning.getMessage() for warning in warnings] == [True]


def test_a_file_cut_short_is_refused_or_computed_again(tmp_path: Path) -> None:
    first = models()
    with opened(first, tmp_path):
        states = read(first)
        os.truncate(path := tmp_path / "student.states", HEADER_BYTES)  # while it is in use
        assert equal(read(first), states)
    with path.open("r+b") as file:
        file.truncate(HEADER_BYTES + 100)
    with (
        pytest.raises(CheckpointError, match="has 4,196 bytes, and its index lists"),
        opened(models(), tmp_path),
    ):
        pass


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_states_from_before_a_block_learnt_on_are_never_used(tmp_path: Path, cache: str) -> None:
    student = tiny_student(n_layer=3).eval()
    activations = models(student=student)
    batch = as_batch(batches(1)[0])
    options = {"activation_cache": cache, "keep_activations": False}
    with opened(activations, tmp_path, **options):
        activations.student_input(2, batch)
        with torch.no_grad():
            next(student.blocks[0].parameters()).mul_(2.0)
        fresh = models(student=student).student_input(3, batch)
        assert torch.equal(activations.student_input(3, batch), fresh)


@pytest.mark.parametrize(
    "limit", [None, pytest.param(10 * (TEACHER_ROW + STUDENT_ROW), marks=pytest.mark.slow)]
)
def test_a_shuffling_loader_gives_the_same_losses_from_disk(
    tmp_path: Path, limit: int | None
) -> None:
    ids = list(torch.cat([raw["input_ids"] for raw in batches(5)]))

    def run(cache: str) -> list[float]:
        loader = DataLoader(ids, batch_size=4, shuffle=True)  # type: ignore[arg-type]
        torch.manual_seed(0)
        options: dict[str, Any] = {"activation_cache": cache, "precision": "fp32"}
        if limit is not None:
            options["activation_cache_gb"] = limit / 1e9
        results = train(tmp_path / cache, data=loader, **options)
        return [*results["backbone_losses"], results["head_loss"]]

    assert run("disk") == pytest.approx(run("off"), rel=1e-5)


def test_auto_says_what_it_chose_and_keeping_needs_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(tmp_path / "auto")
    train(tmp_path / "keep", keep_activations=True)
    said = [r.getMessage() for r in caplog.records if r.name == "distillation.activations"]
    assert len(said) == 2
    assert said[0].startswith("Frozen states are kept in memory: ")
    assert said[0].endswith("is half of the free memory; the data's size is not known.")
    assert said[1].startswith("Frozen states are kept on disk (activation_cache=disk): ")
    assert (tmp_path / "keep" / "activations" / "student.json").is_file()
    for cache in ("ram", "off"):
        with pytest.raises(UsageError, match=f"activation_cache='{cache}' writes none"):
            train(tmp_path / "no", activation_cache=cache, keep_activations=True)


def test_the_users_own_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "notes.txt").write_text("mine")
    activations = models()
    with opened(activations, tmp_path / "activations", keep_activations=False):
        read(activations)
    assert [path.name for path in (tmp_path / "activations").iterdir()] == ["notes.txt"]
