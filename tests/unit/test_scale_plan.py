"""Plans for clusters, counted by hand on small shapes; for large teachers, from shapes alone."""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cleangpt.blocks import BlockStack
from cleangpt.errors import CleanGPTError
from cleangpt.runtime.ranks import Ranks
from cleangpt.structure import count_parameters
from distillation.accelerators import ACCELERATORS, Accelerator, Cluster
from distillation.cache_plan import shown_bytes
from distillation.commands.scale import (
    PLAN_DEVICES,
    TEACHER_SHAPES,
    check_scale_flags,
    plan_for_cluster,
)
from distillation.commands.settings import parse_arguments
from distillation.plan import block_flops
from distillation.scale_advice import advice
from distillation.scale_plan import ScalePlan, device_costs, plan_at_scale
from distillation.scale_sizes import Setup, blocks_whole, copies, outside_blocks, slowest_share
from distillation.workload import Workload
from model import get_model_class
from tests.builders import BLOCKS, VOCAB, WIDTH, tiny_student, tiny_teacher
from tests.contract.source_tree import ROOT

KIND = Accelerator(
    name="toy",
    memory_bytes=1e9,
    flops=1e9,
    memory_rate=1e9,
    link_rate=1e8,
    network_rate=1e7,
    per_node=2,
)
FOUR = Cluster(KIND, 4, efficiency=0.5, link_share=0.5)
WORK = Workload(
    positions=9 * 8 * 12,
    batches=9.0,
    batch_size=8,
    seq_len=12,
    epochs_per_block=(2, 3),
    head_epochs=1,
    polish_epochs=0,
    layer_map=(0, 2),
    schedule="sequential",
)
SETUP = Setup(kept_widths=[WIDTH, 16])
STITCH = 17 * WIDTH


def models() -> tuple[BlockStack, BlockStack]:
    return BlockStack(tiny_teacher()), BlockStack(tiny_student())


def planned(work: Workload = WORK, cluster: Cluster = FOUR, **changes: Any) -> ScalePlan:
    return plan_at_scale(*models(), work, cluster, dataclasses.replace(SETUP, **changes))


def test_times_follow_the_rates() -> None:
    teacher, student = models()
    local = dataclasses.replace(WORK, batch_size=2)
    costs = device_costs(teacher, student, local, FOUR)
    assert costs.teacher_block == pytest.approx(24 * block_flops(teacher, 0, 12) / 0.5e9)
    trained = count_parameters(student.block(1)) + STITCH
    # Four devices are two nodes: the network rules. Each sends 2 (4 - 1) / 4 times the gradients.
    summed = 1.5 * 4 * trained / (0.5 * 1e7)
    step = 3 * 24 * (block_flops(student, 0, 12) + 2 * WIDTH * 16) / 0.5e9
    # Gradients are put side by side for the message, and back.
    moved = (28 + 16) * trained / 1e9
    assert costs.block_step == pytest.approx(step + moved + summed)
    alone = device_costs(teacher, student, local, Cluster(KIND, 1, 0.5))
    assert alone.block_step == pytest.approx(step + 28 * trained / 1e9)


def test_more_devices_share_the_work_and_send_more() -> None:
    plans = [planned(cluster=Cluster(KIND, count)) for count in (1, 2, 8)]
    assert [plan.stages[1].flops for plan in plans] == [pytest.approx(plans[0].stages[1].flops)] * 3
    assert plans[1].cluster.reduced(1.0) == 1.0
    assert plans[2].cluster.link == pytest.approx(0.7e7)
    assert plans[1].cluster.link == pytest.approx(0.7e8)
    once = dataclasses.replace(WORK, epochs_per_block=(1, 1))
    kept = [planned(once, Cluster(KIND, count)).peak.memory.states for count in (1, 8)]
    assert kept[0] == WORK.positions * (WIDTH + 16) * 4
    assert kept[1] == kept[0] / 8
    # With three epochs in other orders, some rows are another process's, which keeps them too.
    again = plans[2].peak.memory.states / kept[1]
    assert again == pytest.approx(copies(8, 8, 3), rel=0.01)
    assert copies(8, 1, 3) == copies(8, 8, 1) == 1.0


@pytest.mark.parametrize(("batch_size", "devices"), [(8, 2), (32, 4), (64, 32)])
def test_rows_change_their_process_as_often_as_planned(batch_size: int, devices: int) -> None:
    generator = torch.Generator().manual_seed(0)
    had: list[set[bytes]] = [set() for _ in range(devices)]
    waited_for = 0
    for _ in range(3):
        for batch in torch.randperm(2048, generator=generator).split(batch_size):
            keys = [hashlib.sha256(bytes([int(i) % 256, int(i) // 256])).digest() for i in batch]
            shares = [
                {keys[position] for position in Ranks(rank, devices).share(keys)}
                for rank in range(devices)
            ]
            waited_for += max(len(share - known) for share, known in zip(shares, had, strict=True))
            for known, share in zip(had, shares, strict=True):
                known |= share
    found = sum(map(len, had)) / 2048
    assert found == pytest.approx(copies(batch_size, devices, 3), rel=0.05)
    waits = waited_for / (2048 / devices)
    assert waits == pytest.approx(slowest_share(batch_size, devices, 3), rel=0.1)


def test_batches_wait_for_at_most_all_rows_of_a_device_in_every_epoch() -> None:
    assert slowest_share(8, 1, 3) == slowest_share(8, 8, 1) == 1.0
    for batch_size, devices in ((4096, 2), (512, 512), (3, 8)):
        waits = slowest_share(batch_size, devices, 3)
        assert copies(batch_size, devices, 3) <= waits <= 3.0


def test_a_spread_teacher_takes_its_share_and_the_blocks_in_use() -> None:
    teacher = models()[0]
    whole, spread = planned(), planned(shards_teacher=True)
    blocks = count_parameters(teacher.model) - outside_blocks(teacher)
    assert whole.peak.memory.teacher == 4 * count_parameters(teacher.model)
    assert blocks_whole((0, 2)) == 2
    in_use = 3 * count_parameters(teacher.block(0))
    expected = outside_blocks(teacher) + blocks / 4 + in_use
    assert spread.peak.memory.teacher == 4 * expected
    # Block 0 runs in the first stage, 1 and 2 in the second, none is left for the head.
    # The head is looked at with one pass through all.
    assert [stage.gathers for stage in spread.stages] == [1, 2, BLOCKS]
    assert [stage.gathers for stage in whole.stages] == [0, 0, 0]
    streamed = planned(shards_teacher=True, cache="off")
    assert [stage.gathers for stage in streamed.stages] == [1, 27 * 3, BLOCKS + 9 * BLOCKS]


def test_a_polish_taught_hidden_states_is_planned_for() -> None:
    """Counted on two real processes in tests/integration/test_scaling_benchmark.py."""
    work = dataclasses.replace(WORK, polish_epochs=2, polish_reads_levels=True)
    how = {"shards_teacher": True, "audit_tokens": 100, "read_out_fits": 1}
    plan = planned(work, **how)
    # Rows change their process, so all blocks come by at each of 2 x 9 steps; once more before.
    assert [stage.gathers for stage in plan.stages][2:] == [BLOCKS, BLOCKS + 18 * BLOCKS]
    # 100 tokens are two batches of 96, and the stitches are fitted on all nine.
    assert plan.measuring_gathers == 2 * BLOCKS + 9 * BLOCKS
    apart = planned(dataclasses.replace(work, reads_teacher=True), **how)
    assert apart.measuring_gathers == 2 * BLOCKS + 2 * 9 * BLOCKS  # the errors of the chain
    # A large batch is measured in parts: 4096 positions are 341 windows of 12.
    large = dataclasses.replace(work, batch_size=1000, positions=10**6, batches=84.0)
    assert planned(large, **how).measuring_gathers == BLOCKS + math.ceil(16_384 / 4092) * BLOCKS
    states = 96 * WIDTH * ((BLOCKS + 1) * 4 + 24)
    assert plan.measured_bytes == states
    weights = plan.peak.memory.teacher + plan.peak.memory.student
    assert plan.audit_memory == plan.audit_bytes + states + weights
    received = (plan.measuring_gathers + sum(s.gathers for s in plan.stages)) * plan.block_bytes
    assert plan.gathered_bytes == pytest.approx(0.75 * received)
    assert f"blocks of the teacher gathered: {shown_bytes(int(0.75 * received))}" in plan.table()
    # Two levels of the teacher lie side by side, and the states that rolled are gone.
    per_row = 2 * WIDTH * 4 * copies(8, 4, 2)
    assert plan.stages[-1].memory.states == pytest.approx(WORK.positions / 4 * per_row, rel=1e-2)
    assert plan.audit_bytes == 2 * 8 * (BLOCKS + 1) * WIDTH**2
    assert plan.fit_bytes == 8 * 2 * 17 * (17 + WIDTH)
    small = dataclasses.replace(SETUP, cache_bytes=10**4)
    without = plan_at_scale(*models(), work, FOUR, small)
    assert without.stages[-1].memory.states == 10**4 / 2  # none fit: the others stay


def test_a_stage_sums_what_it_trains() -> None:
    student = models()[1]
    polished = planned(dataclasses.replace(WORK, polish_epochs=1))
    first, second, head, polish = (stage.reduced_bytes // 4 for stage in polished.stages)
    assert second == count_parameters(student.block(1)) + STITCH
    assert first == count_parameters(student.block(0)) + STITCH + outside_blocks(student)
    assert head == VOCAB * 16
    assert polish == count_parameters(student.model) + VOCAB * 16
    taught = dataclasses.replace(WORK, polish_epochs=1, polish_reads_levels=True)
    assert planned(taught).stages[-1].reduced_bytes // 4 == polish + 2 * STITCH
    fixed = dataclasses.replace(taught, trains_stitches=False)
    assert planned(fixed).stages[-1].reduced_bytes // 4 == polish
    assert planned(fixed).stages[1].reduced_bytes // 4 == second - STITCH
    assert polished.stages[1].memory.training == 12 * second


def test_advice_says_what_to_shard_and_what_is_idle() -> None:
    small = dataclasses.replace(KIND, memory_bytes=8e5, disk_bytes=10.0)
    deep = BlockStack(tiny_teacher(n_layer=12)), BlockStack(tiny_student(n_layer=12))
    work = dataclasses.replace(
        WORK, positions=10**5, epochs_per_block=[1] * 12, layer_map=range(12)
    )
    tight = plan_at_scale(*deep, work, Cluster(small, 4), SETUP)
    lines = advice(tight, 8, SETUP)
    assert any("shard: --shard_teacher leaves" in line for line in lines)
    assert any("of the states have room" in line for line in lines)
    larger = dataclasses.replace(small, memory_bytes=1e6)
    lines = advice(plan_at_scale(*deep, work, Cluster(larger, 4), SETUP), 8, SETUP)
    assert any("--activation_cache disk leaves" in line for line in lines)
    roomy = planned(cluster=Cluster(KIND, 16))
    lines = advice(roomy, 8, SETUP)
    assert any("shard: nothing" in line for line in lines)
    assert any("leave 8 of 16 devices without work" in line for line in lines)


def cluster_plan(*flags: str) -> ScalePlan:
    arguments = parse_arguments(["--plan", *flags])
    check_scale_flags(arguments)
    return plan_for_cluster(arguments, get_model_class)[0]


def test_a_large_teacher_is_planned_for_from_its_shape_alone(tmp_path: Path) -> None:
    fields = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336}
    fields |= {"num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "vocab_size": 128256}))
    flags = ("--plan_device", "h100", "--teacher_config", str(tmp_path), "--plan_tokens", "1e9")
    plan = cluster_plan(*flags, "--plan_devices", "16", "--student_n_layer", "2")
    # A block of Llama 3 8B: 2 x 4096^2 + 2 x 4096 x 1024 + 3 x 4096 x 14336 + 2 x 4096.
    assert plan.block_bytes == 4 * 218_112_000
    assert plan.cluster == Cluster(ACCELERATORS["h100"], 16)
    assert plan.seconds > 60
    lines = plan.table().splitlines()
    assert lines[1].startswith("block-00")
    assert any("device hours" in line for line in lines)


SHAPES = {
    "8B": ("llama-3-8b", "h100", 16, 2048, 16, ()),
    "70B, spread": (
        *("llama-3-70b", "h200", 16, 4096, 32),
        ("--shard_teacher", "--activation_cache", "disk"),
    ),
}
"""Teacher, device, and the student's blocks, width and heads, by the words of the page."""


def rows_of_the_page() -> list[list[str]]:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page]
    return [row for row in rows if row and row[0] in SHAPES]


@pytest.mark.parametrize("row", rows_of_the_page(), ids=lambda row: f"{row[0]} {row[1]}")
def test_the_page_has_the_plans_of_8b_and_70b(row: list[str]) -> None:
    teacher, device, blocks, width, heads, more = SHAPES[row[0]]
    count, kind = row[1].split()
    assert kind == device
    plan = cluster_plan(
        *("--plan_device", device, "--plan_devices", count, "--teacher_config", teacher),
        *("--plan_tokens", "1e9", "--recipe", "best", "--polish_epochs", "1"),
        *("--teacher_dtype", "bf16", "--activation_dtype", "bf16"),
        *("--student_n_layer", str(blocks), "--student_n_embd", str(width)),
        *("--student_n_head", str(heads), "--block_size", "2048", "--batch_size", row[2], *more),
    )
    table = plan.table()
    hours = plan.seconds / 3600
    assert float(row[4]) == pytest.approx(hours, rel=0.06, abs=0.05)
    assert float(row[5].replace(",", "")) == pytest.approx(hours * int(count), rel=0.02)
    operations = re.search(r"in all: ([\d,.]+) PFLOP", table)
    assert operations
    assert float(row[3]) == pytest.approx(float(operations[1].replace(",", "")) / 1e3, rel=0.01)
    states = row[8].split(", ")[1].split(" of ")[0]
    for shown in (row[6].removesuffix(", too much"), f"teacher {row[7]}", states):
        assert shown in table, (shown, table)
    assert ("too much" in row[6]) == (plan.peak.memory.total > ACCELERATORS[device].memory_bytes)
    assert row[9] in table
    audit = re.search(r"in the audit, before all stages: (.*) GB", table)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    told = page[page.index("the audit takes") :][:200].replace("\n", " ")
    assert audit
    assert re.search(rf"\b{re.escape(audit[1])}\b", told), (audit[1], told)
    gathered = f"blocks of the teacher gathered: {row[10]} per device"
    assert (gathered if row[10] else "gathered:") in table if row[10] else "gathered:" not in table


@pytest.mark.parametrize(("teacher", "billions"), [("llama-3-8b", 8.03), ("llama-3-70b", 70.6)])
def test_the_known_shapes_are_those_models(teacher: str, billions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TEACHER_SHAPES[teacher]))
    assert count_parameters(model) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        ("--plan_devices", "4"),
        ("--teacher_config", "llama-3-8b", "--plan_device", "h100"),
        ("--teacher_config", "missing.json", "--plan_device", "h100", "--plan_tokens", "1e9"),
    ],
)
def test_plans_that_cannot_be_are_refused(flags: tuple[str, ...]) -> None:
    with pytest.raises(CleanGPTError, match="plan_device|plan_tokens|missing"):
        cluster_plan(*flags)


def test_the_flag_knows_every_device() -> None:
    assert tuple(ACCELERATORS) == PLAN_DEVICES
    assert torch.tensor([kind.flops for kind in ACCELERATORS.values()]).diff().ge(0).all()
