"""The quality study: budgets are spent as charged, and its statistics are the textbook's."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality import RESULTS
from benchmarks.quality_answers import goals_table, reading
from benchmarks.quality_choices import real_page, sizes_page
from benchmarks.quality_compute import compute_table, reasons, share_of_compute
from benchmarks.quality_data import ALL_BUDGETS
from benchmarks.quality_plan import (
    BUDGETS,
    REAL_KIND,
    REAL_MAPS,
    REAL_SHAPES,
    SHORTENED,
    Run,
    arms,
)
from benchmarks.quality_report import grouped, write_page
from benchmarks.quality_runs import (
    Arm,
    Costs,
    Judge,
    StepLoader,
    Steps,
    run_arm,
    share_out,
    stage_loaders,
)
from benchmarks.quality_statistics import contrast, estimate, holm, over_text
from benchmarks.quality_students import built
from benchmarks.quality_tables import TABLES
from cleangpt.blocks import BlockStack
from tests.builders import VOCAB, tiny_student, tiny_teacher

SMOLLM2 = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)
SHAPE = {"block_size": 16, "vocab_size": VOCAB, "n_layer": 2, "n_head": 2, "n_embd": 16}


def costs() -> Costs:
    student = tiny_student(**SHAPE)
    return Costs(BlockStack(tiny_teacher()), BlockStack(student), 16)


def windows() -> torch.Tensor:
    return torch.randint(1, VOCAB, (40, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(arms()))
@pytest.mark.parametrize("budget", [3e10, 3e11])
def test_an_arm_spends_its_budget_and_no_more(name: str, budget: float) -> None:
    arm, of = arms()[name], costs()
    steps = share_out(arm, of, budget, distinct=10**6, batch_tokens=64)
    assert steps.flops <= budget
    if steps.polish:
        step = 64 * (of.polish_step(next_token=arm.next_token) + of.teacher_blocks)
        assert budget - steps.flops < step
    else:
        assert 1 in (arm.blocks, arm.head)
        assert steps.flops > 0.9 * budget
    assert (steps.blocks > 0) == (arm.blocks > 0)


def test_the_teachers_blocks_are_charged_once_per_token() -> None:
    of, arm = costs(), Arm(name="logits")
    budget = 1e9
    known = share_out(arm, of, budget, distinct=64, batch_tokens=64)
    fresh = share_out(arm, of, budget, distinct=10**9, batch_tokens=64)
    assert known.polish > fresh.polish
    step = 64 * of.polish_step(next_token=False)
    assert fresh.flops == pytest.approx(fresh.polish * (step + 64 * of.teacher_blocks))
    assert known.flops == pytest.approx(known.polish * step + 64 * of.teacher_blocks)


def test_batches_are_shuffled_epochs_and_repeat() -> None:
    windows = torch.arange(10)[:, None].expand(10, 4)
    loader = StepLoader(windows, 5, 4, seed=3)
    seen = [batch["input_ids"][:, 0].tolist() for batch in loader]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(10))
    assert seen[0] + seen[1] != seen[2] + seen[3]
    assert [batch["input_ids"][:, 0].tolist() for batch in loader] == seen
    loader.set_epoch(1)
    assert [batch["input_ids"][:, 0].tolist() for batch in loader] != seen


def test_a_stage_has_as_many_batches_as_it_is_charged() -> None:
    few = Steps(blocks=3, head=2, polish=1, flops=1.0)
    loaders = stage_loaders(windows(), few, seed=1, batch_size=4)
    assert [len(list(loader)) for loader in loaders] == [3, 2, 1]
    none = Steps(blocks=0, head=0, polish=0, flops=1.0)
    assert all(len(loader) > 0 for loader in stage_loaders(windows(), none, 1, 4))


@pytest.mark.parametrize(
    "name", ["A0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("A5", "A8"))]
)
def test_an_arm_runs_and_repeats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality_runs.HEAD_FIT_TOKENS", 256)
    optimizer_steps = []
    counting = register_optimizer_step_post_hook(lambda *_: optimizer_steps.append(1))

    def run() -> dict[str, Any]:
        return run_arm(
            arms()[name],
            teacher=tiny_teacher(),
            windows=windows()[:32],
            judges=[Judge(tiny_teacher(), windows()[32:])],
            kind="Vanilla",
            shape=SHAPE,
            budget=8e7,
            seed=1,
            batch_size=4,
        )

    first = run()
    counting.remove()
    assert run()["loss"] == first["loss"]
    assert math.isfinite(first["loss"])
    charged = first["steps"]
    assert charged["polish"] > 0
    blocks = SHAPE["n_layer"] * charged["blocks"]
    assert len(optimizer_steps) == blocks + charged["head"] + charged["polish"]


def test_the_judge_agrees_with_transformers_own_loss() -> None:
    student, teacher, held_out = tiny_student(**SHAPE).eval(), tiny_teacher(), windows()[32:]
    judge = Judge(teacher, held_out, batch_size=4)
    found = judge(student)
    assert Judge(teacher, held_out, batch_size=4, keep=False)(student) == found
    expected = student(input_ids=held_out, labels=held_out).loss.detach()
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert judge(teacher)["kl"] == pytest.approx(0, abs=1e-6)
    assert judge(teacher)["agreement"] == 1.0


def test_statistics_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    pair = contrast([1.0, 2.0, 4.0, 4.5], [1.5, 2.6, 4.4, 5.0])
    assert pair.difference.mean == pytest.approx(-0.5)
    assert pair.p_value == pytest.approx(0.0010, abs=2e-4)
    assert pair.bootstrap is not None
    assert pair.bootstrap[0] < -0.5 < pair.bootstrap[1]
    assert reading(pair) == "too few seeds"
    assert reading(contrast([1.0, 2.0, 4.0, 4.5, 5.0], [1.5, 2.6, 4.4, 5.0, 5.5])) == "better"
    assert reading(contrast([1.0, 2.0, 4.0, 4.5, 5.0], [1.5, 1.4, 4.4, 4.0, 5.1])) != "better"
    assert holm([0.01, 0.04, 0.03, float("nan")])[:3] == pytest.approx([0.03, 0.06, 0.06])
    with pytest.raises(ValueError, match="cannot be paired"):
        contrast([1.0], [1.0, 2.0])


def test_runs_have_names_of_their_own() -> None:
    keys = [run.key for table in TABLES.values() for run in table()]
    assert len(keys) == len(set(keys))
    assert {run.budget for run in TABLES["arms"]()} == set(BUDGETS)
    assert {run.budget for run in TABLES["efficiency"]()} == set(SHORTENED)
    assert {run.budget for table in TABLES.values() for run in table()} == set(ALL_BUDGETS)


def test_students_of_the_real_teacher_have_about_its_half_and_quarter() -> None:
    sizes = {}
    with torch.device("meta"):
        teacher = LlamaForCausalLM(SMOLLM2)
        for name, shape in REAL_SHAPES.items():
            student = built(REAL_KIND, shape, teacher)
            share = sum(p.numel() for p in student.parameters())
            sizes[name] = share / sum(p.numel() for p in teacher.parameters())
            assert len(REAL_MAPS[name]) == student.config.num_hidden_layers
            assert REAL_MAPS[name][-1] == SMOLLM2.num_hidden_layers - 1
    assert sizes == {"half": pytest.approx(0.5, abs=0.01), "quarter": pytest.approx(0.25, abs=0.01)}
    assert SMOLLM2.num_hidden_layers == 30  # the teacher's own is left as it was


def test_students_to_choose_from_stand_by_size() -> None:
    def record(kind: str, width: int, parameters: int, seed: int) -> dict[str, object]:
        shape = {"n_layer": 6, "n_embd": width}
        rates = {"teacher": 10.0, "student": 15.0}
        found = {"kind": kind, "shape": shape, "seed": seed, "parameters": parameters}
        found |= {"arm": "A5", "budget_name": "middle", "tokens_per_second": rates}
        return {**found, "loss": math.log(50), "kl": 0.5, "agreement": 0.6}

    page = sizes_page(
        [record("SASP", 144, 2_000_000, 1), record("SASP", 144, 2_000_000, 2)],
        [record("Vanilla", 96, 1_000_000, 1), {**record("Vanilla", 96, 1, 9), "arm": "A3"}],
    )
    assert page.splitlines()[2:] == [
        "| Vanilla | 6 x 96 | 1.00M | 50.0 | 0.500 | 60.0% | 1.50 | 1 |",
        "| SASP | 6 x 144 | 2.00M | 50.0 | 0.500 | 60.0% | 1.50 | 2 |",
    ]


def test_a_real_teachers_students_are_shown_with_what_they_write() -> None:
    base = {"shape": {"n_layer": 16, "n_embd": 384}, "parameters": 66_000_000, "seed": 1}
    base |= {"teacher_loss": math.log(20), "loss": math.log(40), "kl": 0.7, "agreement": 0.5}
    base |= {"other_loss": math.log(60), "other_teacher_loss": math.log(30)}
    page = real_page([{**base, "arm": "A5", "samples": {"Once": "upon\n`a` time"}}])
    assert "perplexity is 20.0 on the built-in test text, and 30.0 on the other one." in page
    assert "| 16 x 384, 66M | A5 | 3.689 | 40.0 | 60.0 | 0.700 | 50.0% | 1 |" in page
    assert "- 66M, A5: *Once* `upon 'a' time`" in page


def test_the_page_is_written_from_the_records(tmp_path: Path) -> None:

    records = []
    for arm, shift in (("A0", 1.0), ("A1", 0.5), ("A3", 0.3), ("A4", 0.4), ("A5", 0.1)):
        for seed in range(1, 6):
            loss = 3.5 + shift + (0.013 if arm == "A5" else 0.01) * (seed - 3)
            run = Run(arms()[arm], "Vanilla", "small", seed)
            records.append(
                {
                    "key": run.key,
                    "split": "test",
                    "arm": arm,
                    "kind": "Vanilla",
                    "budget_name": "small",
                    "seed": seed,
                    "loss": loss,
                    "kl": shift,
                    "agreement": 0.5,
                    "teacher_loss": 3.5,
                    "window_losses": [loss + 0.1 * window for window in range(8)],
                    "train_seconds": 10.0,
                }
            )
    folder = tmp_path / "quality"
    folder.mkdir()
    lines = [json.dumps(record) for record in records]
    (folder / "arms.jsonl").write_text("\n".join(lines) + "\n")
    page = write_page(folder, tmp_path / "docs").read_text()
    assert "| small | A5 | Vanilla | 3.6" in page
    assert "90%" in page  # A5 closes nine tenths of the way from A0 to the teacher
    assert "A5 - A3" in page
    assert "better" in page
    assert "| arms | small | 25 of " in page
    assert "of an inherited student (A5 - A3): better at the small budget (-0.2" in page
    assert "| never worse than logit distillation |" not in page  # it is about another budget
    assert "| 0.25 nats better than logit distillation | Vanilla | small | -0.4" in page
    assert (tmp_path / "docs" / "figures" / "loss_against_budget_vanilla.png").stat().st_size > 1000
    assert len(grouped(records)) == 5


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
def test_a_head_phase_costs_its_share_of_what_the_blocks_leave(share: float) -> None:
    of, budget, arm = costs(), 3e10, replace(arms()["A5"], head=share)
    known = share_out(arm, of, budget, distinct=64, batch_tokens=64)
    left = budget - 64 * known.blocks * of.blocks_step()
    assert 64 * known.head * of.head_step() == pytest.approx(share * left, rel=1e-3)
    fresh = share_out(arm, of, budget, distinct=10**9, batch_tokens=64)
    assert fresh.blocks == known.blocks
    assert fresh.head < known.head
    assert fresh.flops <= budget


def test_no_record_of_the_study_spent_more_than_its_budget() -> None:
    records = [
        record
        for path in sorted(RESULTS.glob("*.jsonl"))
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ]
    assert records
    planned = {run.key for table in TABLES.values() for run in table()}
    for record in records:
        assert record["steps"]["flops"] <= record["budget"], record["key"]
        assert record["key"] in planned or record["table"] == "tuning", record["key"]


def test_the_text_decides_as_much_as_its_windows_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 400, generator=generator)
    gain = 0.1 + 0.05 * torch.randn(400, generator=generator)
    low, high = over_text((base - gain).tolist(), base.tolist())
    assert low < float(-gain.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / math.sqrt(400), rel=0.15)


def test_a_share_of_the_way_to_the_teacher_is_shown_as_a_goal() -> None:
    def group(loss: float, spread: float) -> dict[int, dict[str, Any]]:
        return {n: {"loss": loss + spread * n * n, "teacher_loss": 3.0} for n in range(1, 6)}

    best, scratch = group(3.5, 0.001), group(5.0, 0.002)
    half = {("A5", "Vanilla", "middle"): best, ("A0", "Vanilla", "middle"): scratch}
    line = goals_table({}, half).splitlines()[-1]
    goal = "60% of the way from scratch to the teacher, with half of its parameters"
    assert line.startswith(f"| {goal} | Vanilla | middle |")
    assert "closes 75% " in line
    assert line.endswith("| 5 | yes |")


def test_how_much_compute_the_same_loss_takes_lies_between_two_budgets() -> None:
    curve = [(1.0, 4.0), (4.0, 3.0), (16.0, 2.5)]
    assert share_of_compute(curve, 3.5, 8.0) == pytest.approx(2 / 8)  # half way in the logarithm
    assert share_of_compute(curve, 2.75, 16.0) == pytest.approx(8 / 16)
    assert share_of_compute(curve, 4.5, 8.0) == 1 / 8
    assert share_of_compute(curve, 2.0, 16.0) == math.inf

    def table(known: dict[tuple[str, str], list[float]]) -> list[str]:
        groups = {
            (arm, "SASP", budget): {seed: {"loss": loss} for seed, loss in enumerate(losses)}
            for (arm, budget), losses in known.items()
        }
        return [
            line.removeprefix("| A")
            for line in compute_table(groups).splitlines()
            if line.startswith("| A")
        ]

    known = {
        ("A5", "small"): [4.0] * 6,
        ("A5", "middle"): [3.0] * 5,
        ("A1", "middle"): [5.0] * 5,
        ("A3", "middle"): [3.5] * 4 + [2.5],
        ("A3", "large"): [2.0] * 5,  # A5 has not run there yet
    }
    assert table(known) == [
        "1 | SASP | middle | at most 33% | 5 |",
        "3 | SASP | middle | more than 100% in 1 of 5 seeds | 5 |",
    ]
    known["A3", "middle"] = [3.5] * 5
    assert table(known)[1] == "3 | SASP | middle | 58% [58%, 58%] | 5 |"
    # A budget that only some seeds have is left out; one seed that is ahead at once bounds it.
    known["A5", "two thirds of middle"] = [3.4] * 2
    assert table(known)[1] == "3 | SASP | middle | 58% [58%, 58%] | 5 |"
    known["A5", "two thirds of middle"] = [3.4] * 5
    assert table(known)[1] == "3 | SASP | middle | 59% [59%, 59%] | 5 |"
    known["A3", "middle"] = [3.5] * 4 + [4.5]
    assert table(known)[1] == "3 | SASP | middle | at most 54% | 5 |"
    known["A3", "middle"] = [3.5] * 3
    assert table(known)[1] == "3 | SASP | middle | 59% [59%, 59%], too few seeds | 3 |"


def test_a_bar_that_is_not_met_has_its_reason_from_the_records() -> None:
    def group(loss: float, count: int = 5) -> dict[int, Any]:
        return {seed: {"loss": loss} for seed in range(count)}

    middle: dict[tuple[str, str, str], Any] = {
        ("A0", "Vanilla", "middle"): group(5.2),
        ("A0", "Factored", "middle"): group(5.0),
        ("A0", "SASP", "middle"): group(4.5),
    }
    half = {
        ("A5", kind, "middle"): group(loss) for kind, loss in (("Factored", 4.1), ("SASP", 4.2))
    }
    (line,) = reasons(middle, half).splitlines()
    assert "Vanilla 5.20, Factored 5.00, SASP 4.50" in line
    assert "(4.20 and 4.10)" in line
    curve = {("A5", "Vanilla", "small"): group(4.0), ("A5", "Vanilla", "middle"): group(3.0)}
    curve["A3", "Vanilla", "middle"] = group(3.5)
    (line,) = reasons(curve, {}).splitlines()
    assert "worth 42% of the compute" in line
    assert reasons({("A0", "SASP", "middle"): group(4.5, 2)}, {}) == ""
