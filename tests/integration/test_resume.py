"""A run stopped anywhere, any number of times, ends with the bits of one that never was."""

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.errors import CheckpointError, Stopped, UsageError
from cleangpt.integrity import sealed
from distillation import DistillationTrainer
from tests.builders import batches, tiny_student, tiny_teacher
from tests.processes import in_processes

# Two batches are seen again and again, and the third is like them: validation finds later epochs
# better, so that the weights kept are trained ones.
TRAINING: dict[str, Any] = {
    "epochs_per_block": 2,
    "lr_per_block": 1e-2,
    "lm_head_epochs": 2,
    "polish_epochs": 2,
}
STEPS = 4 * (2 * 2 + 2 + 2)
BEST: dict[str, Any] = {
    "distill_loss_type": "nmse",
    "init_from_teacher": "pca",
    "stitch_start": "least_squares",
    "polish_hidden_weight": 3.0,
}


class Shuffled(list[Any]):
    """A loader whose order is a function of the epoch, as ours is."""

    def __init__(self, data: list[Any]) -> None:
        super().__init__(data)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch))
        return iter([self[i] for i in order.tolist()])


def signalling(at: int, kind: Any = torch.optim.AdamW) -> Any:
    """Optimizers that send this process a SIGTERM with their ``at``-th step; 0 is never."""
    count = [0]

    def stepped(*_: Any) -> None:
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    def make(groups: Any, lr: float) -> Any:
        optimizer = kind(groups, lr=lr)
        optimizer.register_step_post_hook(stepped)
        return optimizer

    return make


def trainer(folder: Path, stop: int = 0, **options: Any) -> DistillationTrainer:
    return DistillationTrainer(
        tiny_teacher(),
        tiny_student(dropout=0.1),
        None,
        Shuffled(batches(4)),
        output_dir=folder / "run",
        precision="fp32",
        validation_dataloader=batches(1) if options.pop("validate", True) else None,
        optimizer_cls=signalling(stop, options.pop("kind", torch.optim.AdamW)),
        resume=True,
        **{"log_interval": 1, **options},
    )


def stopped(folder: Path, stop: int, training: Any = TRAINING, **options: Any) -> None:
    """Train until a signal comes with that step from here."""
    with pytest.raises(Stopped, match="saved") as error:
        trainer(folder, stop, **options).train(**training)
    assert error.value.exit_code == 143
    assert json.loads((folder / "run" / "manifest.json").read_text())["status"] == "stopped"


def run(folder: Path, stops: list[int], training: Any = TRAINING, **options: Any) -> Any:
    """Train with stops after so many steps each; return the last trainer and its results."""
    for stop in stops:
        stopped(folder, stop, training, **options)
    own = trainer(folder, **options)
    return own, own.train(**training)


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        dropped = ("seconds", "tokens_per_second", "output_dir", "student_path")
        return {k: timeless(v) for k, v in value.items() if k not in dropped}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def metrics(folder: Path) -> list[Any]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [timeless(json.loads(line)) for line in lines]


def assert_same(straight: Any, resumed: Any, one: Path, other: Path) -> None:
    state: dict[str, Tensor] = straight[0].student_model.state_dict()
    own = resumed[0].student_model.state_dict()
    assert state.keys() == own.keys()
    assert [name for name in state if not torch.equal(state[name], own[name])] == []
    assert repr(timeless(resumed[1])) == repr(timeless(straight[1]))  # NaN is not NaN
    assert metrics(other) == metrics(one)
    name = "stitching_layers.safetensors"
    assert (one / "run" / name).read_bytes() == (other / "run" / name).read_bytes()
    assert not (other / "run" / "checkpoints").exists()


@pytest.mark.parametrize("stop", [8])
def test_a_stop_changes_no_bit(stop: int, tmp_path: Path) -> None:
    """At a hand-over; every other step is among the slow tests."""
    straight = run(tmp_path / "straight", [], **BEST)
    resumed = run(tmp_path / "resumed", [stop], **BEST)
    assert_same(straight, resumed, tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, BEST], ids=["tutorial", "best"])
@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_a_stop_anywhere_changes_no_bit(options: dict[str, Any], stop: int, tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", [], **options)
    resumed = run(tmp_path / "resumed", [stop], **options)
    assert_same(straight, resumed, tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "parallel_local"},
        pytest.param({"schedule": "decoupled", "block_inputs": "teacher"}, marks=pytest.mark.slow),
        pytest.param({"block_inputs": "mixed"}, marks=pytest.mark.slow),
        pytest.param(
            {"activation_cache": "disk", "layer_map": "first", "blocks": [1]},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"freeze_previous_blocks": False, "early_stop_patience": 1, "kind": torch.optim.SGD},
            marks=pytest.mark.slow,
        ),
        pytest.param({"activation_cache": "off"}, marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation_steps": 3}, marks=pytest.mark.slow),
        pytest.param({"head_tying": "tie"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_many_stops_in_every_kind_of_run(options: dict[str, Any], tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", [], **BEST, **options)
    steps = len([e for e in metrics(tmp_path / "straight") if e["event"] == "step"])
    stops = [2, 1, steps // 3, steps // 4]
    resumed = run(tmp_path / "resumed", stops, **BEST, **options)
    assert_same(straight, resumed, tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.slow
def test_decoupled_blocks_go_on_in_another_number_of_processes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": "decoupled", "block_inputs": "teacher"}
    training = {**TRAINING, "train_lm_head": False, "polish_epochs": 0}
    straight = run(tmp_path / "straight", [], training, **options)

    def stopped_in_its_block() -> str:
        with pytest.raises(Stopped) as error:
            trainer(tmp_path / "resumed", 5, **options).train(**training)
        return str(error.value)

    for said in in_processes(2, stopped_in_its_block):
        assert "epoch 1, step 1" in said
    folder = tmp_path / "resumed" / "run"
    run_id = json.loads((folder / "manifest.json").read_text())["run_id"]
    parts = list((folder / "checkpoints").glob("block-*/step-*"))
    assert {part.parent.name for part in parts} == {"block-00", "block-01"}
    assert all(part.name.endswith(run_id[:8]) for part in parts)  # so all are found again
    resumed = run(tmp_path / "resumed", [2], training, **options)
    assert_same(straight, resumed, tmp_path / "straight", tmp_path / "resumed")


def test_blocks_with_checkpoints_of_their_own_are_safe_before_those_go(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(*_: Any) -> None:
        seen.append(sorted(path.name[:13] for path in (tmp_path / "run/checkpoints").iterdir()))

    def make(groups: Any, lr: float) -> Any:
        optimizer = torch.optim.AdamW(groups, lr=lr)
        optimizer.register_step_post_hook(look)
        return optimizer

    own = trainer(tmp_path, schedule="decoupled", block_inputs="teacher")
    own.head_trainer.optimizer_cls = make
    own.train(**TRAINING)
    # The second one says that the blocks are done.
    assert seen[0] == ["step-00000001", "step-00000002"]


def test_what_was_measured_between_stages_is_not_measured_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {**BEST, "block_inputs": "teacher"}
    straight = run(tmp_path / "straight", [], **options)
    resumed = run(tmp_path / "resumed", [STEPS - 2], **options)
    assert_same(straight, resumed, tmp_path / "straight", tmp_path / "resumed")
    assert all(row["chained_error"] > 0 for row in resumed[1]["blocks"])


@pytest.mark.parametrize("stop", [18, pytest.param(9, marks=pytest.mark.slow)])
def test_without_a_polish_the_stitches_are_right_too(stop: int, tmp_path: Path) -> None:
    """Trained ones are written as they are, those of the start never, wherever the stop was."""
    training = {**TRAINING, "polish_epochs": 0}
    straight = run(tmp_path / "straight", [], training, validate=False)
    resumed = run(tmp_path / "resumed", [stop], training, validate=False)
    assert_same(straight, resumed, tmp_path / "straight", tmp_path / "resumed")


def test_a_loader_that_shuffles_by_the_global_generator(tmp_path: Path) -> None:
    ids = torch.cat([batch["input_ids"] for batch in batches(4)])

    def shuffled() -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), 4, shuffle=True)

    ends = []
    for name, stops in (("straight", []), ("resumed", [3, 6])):
        for stop in [*stops, 0]:
            torch.manual_seed(stop)  # whatever was drawn before
            own = trainer(tmp_path / name, stop, validate=False, **BEST, audit_tokens=64)
            for part in (own.backbone_trainer, own.head_trainer, own.polish_trainer):
                part.train_dataloader = shuffled()
            with contextlib.suppress(Stopped):
                own.train(**TRAINING)
        ends.append(own.student_model.state_dict())
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []


def test_the_same_trainer_goes_on_in_a_notebook(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", [])
    own = trainer(tmp_path / "other", 5)
    with pytest.raises(Stopped):
        own.train(**TRAINING)
    own.overwrite, own.resume = False, True
    results = own.train(**TRAINING)
    assert_same(straight, (own, results), tmp_path / "straight", tmp_path / "other")


def test_an_optimizer_that_cannot_be_saved_trains_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["history"] = [object()]
            return super().step(closure)

    own = trainer(tmp_path, kind=Odd, checkpoint_steps=1)
    own.train(**TRAINING)
    assert caplog.text.count("No checkpoints inside this stage: Odd keeps a list") == 4
    with pytest.raises(Stopped, match="cannot be saved; it begins anew"):
        trainer(tmp_path / "other", 7, kind=Odd).train(**TRAINING)


@pytest.mark.slow
def test_what_optimizers_keep_in_their_groups_goes_on(tmp_path: Path) -> None:
    class Slowing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["steps"] = group.get("steps", 0) + 1
                group["lr"] /= group["steps"]
            return super().step(closure)

    straight = run(tmp_path / "straight", [], kind=Slowing)
    resumed = run(tmp_path / "resumed", [6, 5], kind=Slowing)
    assert_same(straight, resumed, tmp_path / "straight", tmp_path / "resumed")


def test_a_finished_run_of_no_known_results_is_not_touched(tmp_path: Path) -> None:
    run(tmp_path, [])
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["results"], manifest["sha256"]
    path.write_text(json.dumps(sealed(manifest)))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"says nothing of its results.*\n.*--overwrite"):
        run(tmp_path, [])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda own: setattr(own.backbone_trainer, "train_dataloader", batches(3)), "data"),
        (lambda own: setattr(own.student_model.config, "n_head", 4), "student"),
        (
            lambda own: setattr(own.backbone_trainer, "validation_dataloader", None),
            "validation data",
        ),
    ],
)
def test_other_data_and_students_are_refused(change: Any, cause: str, tmp_path: Path) -> None:
    stopped(tmp_path, 5)
    own = trainer(tmp_path)
    change(own)
    with pytest.raises(CheckpointError, match=f"has another {cause}"):
        own.train(**TRAINING)


def test_a_finished_run_does_nothing(tmp_path: Path) -> None:
    straight = run(tmp_path, [])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = run(tmp_path, [])
    assert {p: p.stat().st_mtime_ns for p in before} == before
    state, own = (each[0].student_model.state_dict() for each in (straight, again))
    assert all(torch.equal(state[name], own[name]) for name in state)
    assert repr(timeless(again[1])) == repr(timeless(straight[1]))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"distill_loss_type": "cosine"}, "distill_loss_type was 'mse' and is 'cosine'"),
        ({"seed": 1}, "another seed"),
    ],
)
def test_other_settings_are_refused(change: Any, cause: str, tmp_path: Path) -> None:
    stopped(tmp_path, 5)
    before = sorted((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=cause):
        trainer(tmp_path, **change).train(**TRAINING)
    with pytest.raises(CheckpointError, match=r"lr_per_block was 0\.01 and is 0\.02"):
        trainer(tmp_path).train(**{**TRAINING, "lr_per_block": 2e-2})
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == before
    trainer(tmp_path, log_interval=2).train(**TRAINING)


@pytest.mark.parametrize(
    "damage",
    [
        "flip",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("truncate", "remove", "manifest")),
    ],
)
def test_a_damaged_checkpoint_is_not_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = run(tmp_path / "straight", [])
    options = {"checkpoint_steps": 1}
    stopped(tmp_path / "other", 7, **options)
    folder = tmp_path / "other" / "run" / "checkpoints"
    newest, older = sorted(folder.iterdir(), reverse=True)
    spoil(newest, damage)
    caplog.set_level(logging.INFO)
    resumed = run(tmp_path / "other", [], **options)
    assert f"Checkpoint {newest} is not used" in caplog.text
    assert older.name < newest.name
    assert "Going on after 6 steps" in caplog.text
    assert_same(straight, resumed, tmp_path / "straight", tmp_path / "other")


def test_if_all_are_damaged_nothing_starts_over(tmp_path: Path) -> None:
    stopped(tmp_path, 7)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        spoil(path, "flip")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be used .*SHA-256"):
        trainer(tmp_path).train(**TRAINING)


def spoil(folder: Path, damage: str) -> None:
    file = folder / "tensors.safetensors"
    content = file.read_bytes()
    actions: dict[str, Callable[[], object]] = {
        "flip": lambda: file.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]),
        "truncate": lambda: file.write_bytes(content[: len(content) // 2]),
        "remove": file.unlink,
        "manifest": (folder / "MANIFEST.json").unlink,
    }
    actions[damage]()


def test_old_checkpoints_go_and_foreign_ones_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    stopped(tmp_path, 6, checkpoint_steps=1)
    assert len(list(folder.iterdir())) == 2
    foreign = [folder / "step-99999999-ffffffff", folder / "step-99999999", folder / "step-abc"]
    for path in foreign:
        path.mkdir()
    (foreign[0] / "MANIFEST.json").write_text('{"run_id": "another", "format_version": 1}')
    run(tmp_path, [])
    assert sorted(folder.iterdir()) == sorted(foreign)
