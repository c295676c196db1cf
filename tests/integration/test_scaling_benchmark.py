"""The plan for many devices counts what real processes count; their times need a quiet machine."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.scaling import base_shape
from benchmarks.scaling_check import TOLERANCE, Case, planned
from benchmarks.scaling_worker import Task, run
from distillation.accelerators import Accelerator, Cluster
from tests.processes import in_processes

KIND = Accelerator(
    name="any", memory_bytes=1e10, flops=1e9, memory_rate=1e9, link_rate=1e9, network_rate=1e9
)
SHAPE = replace(base_shape(quick=True), batch_size=8)
TAUGHT = {"polish_hidden_weight": 1.0, "audit_tokens": SHAPE.batches * SHAPE.tokens_per_batch}
CASES = [
    Case("disk", SHAPE, 2, shards=True, options={"activation_cache": "disk"}),
    Case("none", SHAPE, 2, shards=True, options={"activation_cache": "off"}),
    Case("together", SHAPE, 2, options={"schedule": "parallel_local"}),
    Case("together, spread", SHAPE, 2, shards=True, options={"schedule": "parallel_local"}),
    Case("polished", SHAPE, 2, shards=True, polish_epochs=2, options=TAUGHT),
    Case(
        *("polished, none", SHAPE, 2, True, 2),
        {**TAUGHT, "activation_cache": "off"},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_plan_counts_what_processes_count(case: Case, tmp_path: Path) -> None:
    task = Task(
        *(case.shape, str(tmp_path)),
        shards=case.shards,
        polish_epochs=case.polish_epochs,
        options=case.options,
    )
    found = in_processes(2, lambda: asdict(run(task)))[0]
    plan = planned(case, Cluster(KIND, case.processes))
    kept = plan.disk_bytes or max(stage.memory.states for stage in plan.stages)
    expected = {
        "training": max(stage.memory.training for stage in plan.stages),
        "states": kept,
        "disk": plan.disk_bytes,
        "reduced": sum(stage.steps * stage.reduced_bytes for stage in plan.stages),
        "audit": plan.audit_bytes,
        "fit": plan.fit_bytes,
    }
    found["training"] = max(found["training"])
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, rel=TOLERANCE), name
    # A stage may find one block whole that the one before has left.
    assert found["gathered"] / plan.block_bytes == pytest.approx(plan.gathers, abs=2)
