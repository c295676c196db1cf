"""What a run is told to cost: counted from shapes, timed on small copies, and nothing touched."""

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.blocks import BlockStack
from cleangpt.errors import UsageError
from distillation.cache_plan import CachePlan
from distillation.plan import RunPlan, block_flops, plan_run
from distillation.probe import Costs, shrunk
from distillation.workload import Workload
from tests.builders import FAMILIES, STUDENTS, VOCAB, WIDTH, batches, tiny_student, tiny_teacher

COSTS = Costs(
    teacher_block=1.0, student_block=0.1, block_step=2.0, first_block_step=5.0, head_step=7.0
)
WORK = Workload(
    positions=9 * 4 * 12,
    batches=9.0,
    batch_size=4,
    seq_len=12,
    epochs_per_block=(2, 3),
    head_epochs=2,
    polish_epochs=0,
    layer_map=(0, 2),
    schedule="sequential",
)
RAM = CachePlan("ram", 10**9, "in memory")


def planned(work: Workload = WORK, cache: CachePlan = RAM) -> RunPlan:
    teacher, student = BlockStack(tiny_teacher()), BlockStack(tiny_student())
    return plan_run(teacher, student, work, COSTS, cache, 10**6)


def test_seconds_are_counted_by_hand() -> None:
    first, second, head = planned().stages
    # Nine batches. Block 0: one teacher pass through one block, two epochs of steps.
    assert first.seconds == (pytest.approx(9 * (1 + 2 * 5)), pytest.approx(9 * (2 * 1 + 2 * 5)))
    # Block 1: two teacher blocks and a student block once, or all of them in each of three epochs.
    kept, streamed = 9 * (2 + 0.1 + 3 * 2), 9 * 3 * (3 + 0.1 + 2)
    assert second.seconds == (pytest.approx(kept), pytest.approx(streamed))
    # Head: the last teacher block is there already; streamed, all three teacher blocks run.
    assert head.seconds == (pytest.approx(9 * (0.1 + 14)), pytest.approx(9 * 2 * (3.2 + 7)))
    assert [stage.steps for stage in (first, second, head)] == [18, 27, 18]


def test_blocks_in_parallel_run_the_teacher_once_per_batch() -> None:
    first, second, _ = planned(dataclasses.replace(WORK, schedule="parallel_local")).stages
    assert first.seconds[0] == pytest.approx(9 * 2 * (1 + 5))
    assert second.seconds[0] == pytest.approx(9 * 3 * (2 + 2))
    all_kept = dataclasses.replace(WORK, schedule="parallel_local", levels_fit=True)
    first, second, _ = planned(all_kept).stages
    assert first.seconds == (pytest.approx(9 * (1 + 2 * 5)), pytest.approx(9 * 2 * (1 + 5)))
    assert second.seconds[0] == pytest.approx(9 * (2 + 3 * 2))


def test_teacher_inputs_roll_on_by_themselves_and_need_no_student() -> None:
    work = dataclasses.replace(WORK, reads_teacher=True, reads_student=False)
    first, second, head = planned(work).stages
    assert first.seconds == planned().stages[0].seconds
    # Block 1 learns from the output of block 2, and its input has to come through block 0.
    kept, streamed = 9 * (2 + 1 + 3 * 2), 9 * 3 * (3 + 1 + 2)
    assert second.seconds == (pytest.approx(kept), pytest.approx(streamed))
    assert head.seconds[0] == pytest.approx(9 * (2 * 0.1 + 14))
    mixed = planned(dataclasses.replace(WORK, reads_teacher=True)).stages[1]
    assert mixed.seconds == (pytest.approx(kept + 0.9), pytest.approx(streamed + 2.7))


def test_blocks_that_go_on_learning_cost_their_steps() -> None:
    first, second, _ = planned(dataclasses.replace(WORK, freeze_previous=False)).stages
    assert first.seconds[0] == pytest.approx(9 * (1 + 2 * 5))
    assert second.seconds[0] == pytest.approx(9 * (2 + 3 * (5 + 2)))
    assert second.flops[0] > planned().stages[1].flops[0]


def test_a_polish_steps_through_everything() -> None:
    polish = planned(dataclasses.replace(WORK, polish_epochs=3)).stages[-1]
    assert polish.name == "polish"
    assert polish.steps == 27
    # Both blocks and the head learn in each step; streamed, the teacher's three blocks run as well.
    step = 5 + 2 + 7
    assert polish.seconds == (pytest.approx(9 * 3 * step), pytest.approx(9 * 3 * (step + 3)))
    alone = planned(dataclasses.replace(WORK, polish_epochs=3, head_epochs=None)).stages[-1]
    assert alone.seconds[0] == pytest.approx(9 * (3 + 3 * step))


def test_each_further_pass_starts_from_the_tokens() -> None:
    first, second, head = planned(dataclasses.replace(WORK, passes=3)).stages
    assert first.seconds == (
        pytest.approx(9 * 3 * (1 + 2 * 5)),
        pytest.approx(9 * 3 * (2 * 1 + 2 * 5)),
    )
    # Block 1 finds the states of one pass, and runs all blocks up to it once in the two others.
    kept = (2 + 0.1 + 3 * 2) + 2 * (3 + 0.1 + 3 * 2)
    assert second.seconds == (pytest.approx(9 * kept), pytest.approx(9 * 3 * 3 * (3 + 0.1 + 2)))
    assert head.seconds[0] == pytest.approx(9 * ((0.1 + 14) + 2 * (3 + 0.2 + 14)))
    assert [stage.steps for stage in (first, second, head)] == [54, 81, 54]
    polish = planned(dataclasses.replace(WORK, polish_epochs=2, passes=3)).stages[-1]
    assert polish.seconds[0] == pytest.approx(9 * (3 * 2 * 14 + 2 * 3))
    together = dataclasses.replace(WORK, schedule="parallel_local", passes=3)
    assert planned(together).stages[0].seconds[0] == pytest.approx(9 * 3 * 2 * (1 + 5))


def test_a_loss_on_held_out_text_is_taken_before_the_first_epoch_and_after_each() -> None:
    # A quarter as much text: its states are computed once as well, or as often as they are needed.
    first, second, head = planned(dataclasses.replace(WORK, held_out=0.25)).stages
    assert first.seconds == (
        pytest.approx(9 * (1.25 + (2 + 0.25 * 3 / 3) * 5)),
        pytest.approx(9 * ((2 + 0.25 * 3) * 1 + (2 + 0.25 * 3 / 3) * 5)),
    )
    assert second.seconds[0] == pytest.approx(9 * (1.25 * 2.1 + (3 + 0.25 * 4 / 3) * 2))
    assert head.seconds[0] == pytest.approx(9 * (1.25 * 0.1 + (2 + 0.25 * 3 / 3) * 7))
    assert [stage.steps for stage in (first, second, head)] == [18, 27, 18]
    assert first.flops[0] > planned().stages[0].flops[0]
    local = dataclasses.replace(WORK, schedule="parallel_local", held_out=0.25)
    again, steps = 2 + 0.25 * 3, (2 + 0.25 * 3 / 3) * 5  # no room for all levels
    assert planned(local).stages[0].seconds[0] == pytest.approx(9 * (again * 1 + steps))
    fits = planned(dataclasses.replace(local, levels_fit=True)).stages[0]
    assert fits.seconds[0] == pytest.approx(9 * (1.25 * 1 + steps))
    none = dataclasses.replace(WORK, epochs_per_block=[0, 3], held_out=0.25)
    assert planned(none).stages[0].seconds == (0, 0)


def test_room_for_half_the_states_takes_the_time_between() -> None:
    half = planned(cache=CachePlan("ram", 5 * 10**5, "half"))
    none = planned(cache=CachePlan("off", 0, "off"))
    assert planned().kept_share == 1.0
    assert none.seconds > half.seconds > planned().seconds
    assert half.seconds == pytest.approx((none.seconds + planned().seconds) / 2)
    disk = planned(cache=CachePlan("disk", 10**9, "on disk"))
    assert disk.disk_bytes - planned().disk_bytes == 10**6
    assert planned().memory_bytes - disk.memory_bytes == 10**6


def test_operations_follow_the_weights() -> None:
    stack = BlockStack(tiny_teacher())
    # GPT-2: 12 d^2 weights in matrices, two operations each, and causal attention.
    assert block_flops(stack, 0, 12) == 2 * 12 * WIDTH**2 + 2 * 12 * WIDTH
    head = planned().stages[-1]
    heads = 2 * VOCAB * (WIDTH + 3 * 16)
    passes = block_flops(BlockStack(tiny_student()), 0, 12)
    assert head.flops[0] == pytest.approx(WORK.positions * (2 * heads + passes))


def test_a_teacher_in_half_precision_takes_half_the_memory() -> None:
    whole, half = tiny_teacher(), tiny_teacher().bfloat16()
    memory = [
        plan_run(BlockStack(teacher), BlockStack(tiny_student()), WORK, COSTS, RAM, 0).memory_bytes
        for teacher in (whole, half)
    ]
    assert memory[0] - memory[1] == 2 * sum(p.numel() for p in whole.parameters())


def test_the_table_has_a_line_per_stage_and_the_totals() -> None:
    lines = planned().table().splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["block-00", "block-01", "lm-head"]
    assert "1,000" not in lines[1]
    assert any("in memory" in line for line in lines)


@pytest.mark.parametrize("name", [*FAMILIES, *STUDENTS])
def test_any_model_has_a_small_copy_even_without_weights(name: str) -> None:
    with torch.device("meta"):
        model = tiny_student(name) if name in STUDENTS else tiny_teacher(name)
    small = shrunk(model, 1)
    stack = BlockStack(small)
    assert stack.num_blocks == 1
    assert stack.hidden_size == BlockStack(model).hidden_size
    assert stack.state_entering(1, torch.zeros((1, 4), dtype=torch.long)).isfinite().all()


class Windows(torch.utils.data.Dataset[Any]):
    """Random windows that tell their size."""

    block_size = 12

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        rows = torch.cat([raw["input_ids"] for raw in batches()])
        return rows[index]


def trainer_of(place: Path, loader: Any, **options: Any) -> Any:
    from distillation import DistillationTrainer

    models = (tiny_teacher(), tiny_student(), None, loader)
    return DistillationTrainer(*models, output_dir=place / "run", **options)


def test_planning_changes_nothing(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(Windows(), batch_size=4, shuffle=True)
    trainer = trainer_of(tmp_path, loader)
    teacher = copy.deepcopy(trainer.backbone_trainer.teacher_model.state_dict())
    student = copy.deepcopy(trainer.student_model.state_dict())
    random = torch.get_rng_state()
    plan = trainer.plan(2, lm_head_epochs=3)
    assert repr(plan) == plan.table()
    assert torch.equal(torch.get_rng_state(), random)
    assert list(tmp_path.iterdir()) == []
    for name, tensor in trainer.student_model.state_dict().items():
        assert torch.equal(tensor, student[name])
    for name, tensor in trainer.backbone_trainer.teacher_model.state_dict().items():
        assert torch.equal(tensor, teacher[name])
    assert [stage.steps for stage in plan.stages] == [8, 8, 12]
    assert 0 < plan.seconds < 600
    assert plan.cache_bytes == 16 * 12 * (32 + 16) * 4


def test_held_out_states_need_room_and_time_too(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(Windows(), batch_size=4)
    plain = trainer_of(tmp_path, loader).plan(2)
    trainer = trainer_of(tmp_path, loader, validation_dataloader=loader)
    plan = trainer.plan(2)
    assert plan.cache_bytes == 2 * plain.cache_bytes
    for own, without in zip(plan.stages, plain.stages, strict=True):
        assert own.steps == without.steps
        assert own.flops[0] > without.flops[0]


def test_the_command_plans_for_its_held_out_text(tmp_path: Path) -> None:
    from distillation.commands.distil import plan, prepare
    from distillation.commands.settings import parse_arguments
    from tests.contract.local_hub import save_tiny_gpt2, write_stories

    save_tiny_gpt2(tmp_path / "teacher", blocks=2)
    write_stories(tmp_path / "stories")
    flags = ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--device", "cpu"]
    flags += ["--dataset_name", str(tmp_path / "stories"), "--block_size", "32", "--plan"]
    flags += ["--output_dir", str(tmp_path / "run"), "--student_n_embd", "16"]
    plans = []
    for tokens in ("0", "64"):
        arguments = parse_arguments([*flags, "--validation_tokens", tokens])
        plans.append(plan(prepare(arguments)[0], arguments))
    none, some = plans
    assert some.cache_bytes == none.cache_bytes + 64 * (48 + 16) * 4
    assert some.stages[0].flops[0] > none.stages[0].flops[0]


def test_a_loader_of_unknown_size_has_no_plan(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="how many tokens"):
        trainer_of(tmp_path, batches()).plan(1)


def test_the_command_prints_a_plan_and_a_run_compares_itself_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from examples.run_distillation_example import main
    from tests.contract.local_hub import save_tiny_gpt2, write_stories

    save_tiny_gpt2(tmp_path / "teacher", blocks=2)
    write_stories(tmp_path / "stories")
    flags = ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--device", "cpu"]
    flags += ["--dataset_name", str(tmp_path / "stories"), "--block_size", "32"]
    flags += ["--student_n_embd", "16", "--student_n_head", "2", "--epochs_per_block", "2"]
    flags += ["--output_dir", str(tmp_path / "run")]
    main([*flags, "--plan"])
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for words in ("block-00", "block-01", "lm-head", "cache off", "memory:", "disk:"):
        assert words in printed
    with caplog.at_level(logging.INFO):
        main(flags)
    assert "Planned" in caplog.text
    assert (tmp_path / "run" / "final").is_dir()
