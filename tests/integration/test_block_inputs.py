"""What enters a block while it learns, and blocks that do not wait for each other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.errors import UsageError
from distillation import DistillationTrainer
from distillation.activations import Activations
from distillation.audit import audit_teacher, pca_basis
from distillation.batch import as_batch
from distillation.block_inputs import MixedInputs, TeacherInputs, share_basis
from distillation.losses import DistillationLoss, TargetStatistics
from distillation.trainers.block_rows import chained_errors
from stitching_layers import StitchingLayers
from tests.builders import (
    WIDTH,
    backbone_trainer,
    batches,
    tiny_student,
    tiny_teacher,
    unchanged,
    weights_of,
)
from tests.processes import in_processes

ONCE: dict[str, Any] = {"audit_tokens": 0}


def train(
    place: Path, schedule: str = "sequential", kind: str = "Vanilla", **more: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    student = more.pop("student", None) or tiny_student(kind, n_layer=3)
    options = {"block_inputs": "teacher", **more}
    trainer = backbone_trainer(place, student, schedule=schedule, **options)
    rows = trainer.train_backbone(2, 1e-2)["blocks"]
    return weights_of(student), rows


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.parametrize("kind", ["Vanilla", pytest.param("SASP", marks=pytest.mark.slow)])
def test_with_teacher_inputs_all_schedules_end_with_the_same_bits(
    tmp_path: Path, kind: str
) -> None:
    one, rows = train(tmp_path / "a", "sequential", kind)
    for schedule in ("parallel_local", "decoupled"):
        other, others = train(tmp_path / schedule, schedule, kind)
        assert unchanged(one, other) == one.keys()
        assert [timeless(row) for row in rows] == [timeless(row) for row in others]


@pytest.mark.slow
def test_the_order_of_blocks_does_not_matter(tmp_path: Path) -> None:
    straight, _ = train(tmp_path / "a")
    student = tiny_student(n_layer=3)
    for block in (2, 0, 1):
        train(tmp_path / str(block), student=student, blocks=[block])
    assert unchanged(straight, weights_of(student)) == straight.keys()


@pytest.mark.parametrize("how", ["teacher", pytest.param("mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["Vanilla", pytest.param("Factored", marks=pytest.mark.slow)])
def test_every_cache_gives_the_same_bits(tmp_path: Path, how: str, kind: str) -> None:
    def run(cache: str) -> dict[str, Tensor]:
        options: dict[str, Any] = {"block_inputs": how, "activation_cache": cache}
        return train(tmp_path / cache, kind=kind, **options)[0]

    ram, disk, off = run("ram"), run("disk"), run("off")
    assert unchanged(ram, disk) == unchanged(ram, off) == ram.keys()


def test_at_equal_width_a_copy_of_the_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    student = tiny_student(n_layer=3, n_embd=WIDTH, n_head=4, block_size=32)
    options: dict[str, Any] = {"init_from_teacher": "layers", "distill_loss_type": "nmse"}
    trainer = backbone_trainer(tmp_path, student, block_inputs="teacher", **options)
    row = trainer.train_backbone(0, 1e-2)["blocks"]
    assert all(own["chained_error"] < 1e-9 for own in row)


def test_teacher_inputs_are_its_states_in_the_basis_of_the_read_out() -> None:
    trainer = backbone_trainer(Path("unused"), tiny_student(n_layer=3))
    batch = as_batch(batches(1)[0], torch.device("cpu"))
    audit = audit_teacher(trainer.teacher, [batch], 1)
    basis = pca_basis(audit.pooled_covariance(), 16)
    states = Activations(trainer.teacher, trainer.student, 2**20)
    inputs = TeacherInputs(states, [0, 1, 2], basis)
    levels = trainer.teacher.block_hidden_states(batch.input_ids)
    torch.testing.assert_close(inputs.entering(2, batch, 0.0), levels[2] @ basis)
    stitches = StitchingLayers([0, 1, 2], 16, WIDTH)
    share_basis(stitches, basis, audit.level_means[1:])
    seen = stitches[1](levels[2] @ basis)
    # The best there is in this basis: the rest of the state, but for its mean, is out of reach.
    rest = levels[2] - seen
    torch.testing.assert_close(rest.mean((0, 1)), torch.zeros(WIDTH), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(rest @ basis, torch.zeros(4, 12, 16), atol=1e-5, rtol=0.0)


def test_of_a_factored_state_the_teacher_gives_the_sum_and_the_chain_the_token_stream() -> None:
    trainer = backbone_trainer(Path("unused"), tiny_student("Factored", n_layer=3, n_embd=WIDTH))
    batch = as_batch(batches(1)[0], torch.device("cpu"))
    trainer.student_model.eval()
    states = Activations(trainer.teacher, trainer.student, 2**20)
    with torch.no_grad():
        entering = TeacherInputs(states, [0, 1, 2], None).entering(1, batch, 0.0)
        own = trainer.student.state_entering(1, batch.input_ids)
    target = trainer.teacher.block_hidden_states(batch.input_ids)[1]
    torch.testing.assert_close(trainer.student.hidden(entering), target)
    assert torch.equal(entering[..., :WIDTH], own[..., :WIDTH])


def test_mixed_inputs_go_over_from_the_teachers_to_the_students_window_by_window() -> None:
    trainer = backbone_trainer(Path("unused"), tiny_student(n_layer=3, n_embd=WIDTH))
    batch = as_batch(batches(1, batch_size=16)[0], torch.device("cpu"))
    states = Activations(trainer.teacher, trainer.student, 2**20)
    mixed, taught = MixedInputs(states, [0, 1, 2], None), TeacherInputs(states, [0, 1, 2], None)
    trainer.student_model.eval()
    own, given = states.student_input(1, batch), taught.entering(1, batch, 0.0)
    from_teacher = []
    for progress in (0.0, 0.3, 0.6, 0.999):
        seen = mixed.entering(1, batch, progress)
        rows = [bool(torch.equal(*pair)) for pair in zip(seen, given, strict=True)]
        assert all(torch.equal(seen[i], own[i]) for i, from_it in enumerate(rows) if not from_it)
        from_teacher.append(sum(rows))
    assert from_teacher[0] == 16 > from_teacher[1] > from_teacher[2] > from_teacher[3] == 0
    with torch.no_grad():
        assert torch.equal(mixed.entering(1, batch, 0.0), own)


@pytest.mark.parametrize("loss_type", ["nmse", "smooth_l1", "cosine", "whiten"])
def test_on_raw_states_a_standardising_loss_is_zero_for_the_teachers_own(loss_type: str) -> None:
    states = 50 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    loss = DistillationLoss(loss_type).at_level(TargetStatistics.of(states)).on_raw_states()
    assert float(loss(states, states)) < 1e-6
    assert float(loss(states + 5, states)) > 1e-3
    student = (states + 1).requires_grad_()
    loss(student, states).backward()
    assert student.grad is not None
    assert float(student.grad.abs().sum()) > 0


def test_on_raw_states_the_size_of_a_state_counts() -> None:
    states = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    loss = DistillationLoss("nmse").at_level(TargetStatistics.of(states)).on_raw_states()
    assert float(loss(2 * states, states)) > 0.5


@pytest.mark.parametrize("how", ["student", "teacher", "mixed"])
def test_blocks_learn_and_both_errors_are_reported(tmp_path: Path, how: str) -> None:
    data = batches(8)
    options: dict[str, Any] = {"init_from_teacher": "pca", "distill_loss_type": "nmse"}
    _, rows = train(tmp_path, block_inputs=how, data=data, **options)
    assert all(row["last_loss"] < row["first_loss"] for row in rows)
    assert all(0 < row["chained_error"] < 2 for row in rows)
    if how == "student":
        assert all(row["chained_error"] == row["relative_error"] for row in rows)
    if how == "teacher":  # errors add up
        assert rows[-1]["chained_error"] > rows[-1]["relative_error"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"block_inputs": "student"}, marks=pytest.mark.slow),
        pytest.param({"block_inputs": "teacher"}, marks=pytest.mark.slow),
        {"block_inputs": "teacher", "schedule": "decoupled"},
        pytest.param({"block_inputs": "mixed"}, marks=pytest.mark.slow),
        pytest.param({"schedule": "parallel_local"}, marks=pytest.mark.slow),
        pytest.param({"freeze_previous_blocks": False}, marks=pytest.mark.slow),
        pytest.param({"blocks": [1]}, marks=pytest.mark.slow),
        pytest.param({"schedule": "parallel_local", "blocks": [1]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_chained_error_is_that_of_the_finished_student(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    own: dict[str, Any] = {"init_from_teacher": "pca", "distill_loss_type": "nmse", **options}
    student = tiny_student(n_layer=3)
    trainer = backbone_trainer(tmp_path, student, data=batches(8), **own)
    told = [row["chained_error"] for row in trainer.train_backbone([12, 6, 3], 1e-2)["blocks"]]
    stages = [trainer._stage(block, trainer.activations) for block in range(len(told))]
    found = chained_errors(stages, trainer.batches(0), 10**6)
    if "parallel_local" in options.values() and "blocks" in options:  # read out as they are now
        for stage in (stages[0], stages[2]):
            before = stage.stitch.projection.weight.clone()
            stage.fit_stitch(trainer.batches(0), 10**6)
            torch.testing.assert_close(stage.stitch.projection.weight, before)
    # Of a block that learnt in the chain it is not measured again: the mean over the last epoch.
    in_chain = {"student": [0, 1, 2], "parallel_local": [0], "[1]": [1]}
    for block in range(3):
        of_training = block in in_chain.get(str(next(reversed(options.values()))), [])
        assert told[block] == pytest.approx(found[block], rel=0.1 if of_training else 1e-5)
        assert not of_training or told[block] != found[block]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_inputs": "teacher", "freeze_previous_blocks": False}, "asks for one"),
        ({"block_inputs": "student", "schedule": "decoupled"}, "--block_inputs teacher"),
        ({"block_inputs": "mixed", "schedule": "decoupled"}, "--block_inputs teacher"),
        ({"block_inputs": "mixed", "schedule": "parallel_local"}, "--schedule sequential"),
        ({"block_inputs": "both"}, "student, teacher, mixed"),
    ],
)
def test_inputs_and_schedules_that_cannot_go_together_are_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        backbone_trainer(tmp_path, **options)


def test_a_student_wider_than_its_teacher_cannot_be_given_its_states(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no wider than the teacher"):
        backbone_trainer(tmp_path, tiny_student(n_embd=48), block_inputs="teacher")


def test_blocks_with_a_stream_of_their_own_cannot_be_decoupled(tmp_path: Path) -> None:
    options: dict[str, Any] = {"block_inputs": "teacher", "schedule": "decoupled"}
    with pytest.raises(UsageError, match="--schedule sequential"):
        backbone_trainer(tmp_path, tiny_student("Factored"), **options)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_blocks_spread_over_processes_end_with_the_bits_of_one_process(
    tmp_path: Path, count: int
) -> None:
    folder = tmp_path / "together"

    def work() -> Any:
        weights, rows = train(folder, "decoupled", distill_loss_type="nmse")
        plain = {name: tensor.tolist() for name, tensor in weights.items()}
        return plain, [timeless(row) for row in rows]

    weights, rows = train(tmp_path / "alone", "sequential", distill_loss_type="nmse")
    for theirs, their_rows in in_processes(count, work):
        assert all(torch.equal(torch.tensor(theirs[n]), weights[n]) for n in weights)
        assert their_rows == [timeless(row) for row in rows]


def test_the_metrics_of_all_processes_come_together(tmp_path: Path) -> None:
    def work() -> Any:
        return run_all(tmp_path / "two", "decoupled")

    run_all(tmp_path / "one", "sequential")
    in_processes(2, work)
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert not (tmp_path / "two" / "run" / "checkpoints").exists()


def run_all(place: Path, schedule: str) -> None:
    """A whole run of blocks alone."""
    trainer = DistillationTrainer(
        tiny_teacher(),
        tiny_student(n_layer=3),
        None,
        batches(),
        output_dir=place / "run",
        schedule=schedule,
        block_inputs="teacher",
        log_interval=1,
    )
    trainer.train(2, 1e-2, train_lm_head=False)


def metrics(place: Path) -> list[Any]:
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    dropped = ("seconds", "tokens_per_second")
    records = [{k: v for k, v in json.loads(x).items() if k not in dropped} for x in lines]
    return sorted(records, key=lambda record: json.dumps(record, sort_keys=True))
