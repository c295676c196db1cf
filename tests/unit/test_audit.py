"""The audit of a teacher's hidden states, against direct computations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError, UsageError
from distillation.audit import TeacherAudit, audit_teacher, pca_basis
from distillation.batch import Batch, as_batch
from distillation.losses import DistillationLoss
from distillation.losses.target_statistics import token_normalised
from tests.builders import BLOCKS, WIDTH, batches, padded, tiny_teacher

CPU = torch.device("cpu")


def as_batches(raw: list[dict[str, Tensor]]) -> list[Batch]:
    return [as_batch(batch, CPU) for batch in raw]


def audited(
    teacher: Any, raw: list[dict[str, Tensor]] | None = None, **limits: int
) -> TeacherAudit:
    return audit_teacher(
        BlockStack(teacher), as_batches(batches() if raw is None else raw), **limits
    )


@torch.no_grad()
def states_of(teacher: Any) -> list[Tensor]:
    """All states of each level, [windows, seq, d], in float64."""
    stack = BlockStack(teacher)
    levels = zip(*(stack.block_hidden_states(**batch) for batch in batches()), strict=True)
    return [torch.cat(level).double() for level in levels]


def with_giant(channel: int = 5, value: float = 3000.0) -> Any:
    """A teacher that writes one huge value at each window's first position."""
    teacher = tiny_teacher("gpt2")
    with torch.no_grad():
        teacher.transformer.wpe.weight[0, channel] = value
    return teacher


def levels_of(audit: TeacherAudit) -> list[dict[str, Any]]:
    levels: list[dict[str, Any]] = audit.to_json()["levels"]
    return levels


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_number_is_that_of_a_direct_computation(family: str) -> None:
    teacher = tiny_teacher(family)
    audit = audited(teacher)
    assert audit.tokens == 4 * 4 * 12
    assert [level.level for level in audit.levels] == list(range(BLOCKS + 1))
    for found, states in zip(audit.levels, states_of(teacher), strict=True):
        norms, flat = states.norm(dim=-1), states.flatten(0, 1)
        assert found.rms == pytest.approx(flat.square().mean().sqrt().item(), rel=1e-5)
        expected = [norms.flatten().kthvalue(k).values.item() for k in (10, 96, 183, 192)]
        assert found.token_norms == pytest.approx(expected, rel=1e-5)
        elsewhere = norms[:, 1:].flatten().sort().values[(16 * 11 - 1) // 2]
        ratio = norms[:, 0].square().mean().sqrt() / elsewhere
        assert found.first_position_ratio == pytest.approx(ratio.item(), rel=1e-5)
        energy = flat.square().sum(0)
        assert found.largest_channel_share == pytest.approx((energy.max() / energy.sum()).item())
        values = torch.linalg.eigvalsh(flat.T.cov(correction=0))
        rank = values.sum().square() / values.square().sum()
        assert found.effective_rank == pytest.approx(rank.item(), rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_statistics_are_those_of_all_normalised_tokens(family: str) -> None:
    teacher = tiny_teacher(family)
    audit = audited(teacher)
    for level, states in enumerate(states_of(teacher)):
        normalised = token_normalised(states).flatten(0, 1)
        found = audit.statistics(level)
        torch.testing.assert_close(found.mean, normalised.mean(0).float(), rtol=1e-4, atol=1e-5)
        covariance = normalised.T.cov(correction=0).float()
        torch.testing.assert_close(found.covariance, covariance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 8, 31, WIDTH, WIDTH + 1])
def test_no_linear_read_out_of_so_many_channels_is_better_than_the_floor(width: int) -> None:
    teacher = tiny_teacher()
    level = audited(teacher).levels[2]
    states = states_of(teacher)[2].flatten(0, 1)
    target = DistillationLoss("nmse").target(states)
    for floor, wanted in (
        (level.rank_floor(width), target),
        (level.raw_rank_floor(width), states),
    ):
        centred = wanted - wanted.mean(0)
        singular = torch.linalg.svdvals(centred).square()
        best = singular[width:].sum() / singular.sum()
        assert floor == pytest.approx(best.item(), abs=1e-5)


def test_a_massive_channel_is_named_where_it_is_and_only_there() -> None:
    plain = audited(tiny_teacher())
    assert [level.massive_channels for level in plain.levels] == [()] * (BLOCKS + 1)
    audit = audited(with_giant(channel=5))
    for level in audit.levels:
        assert level.massive_channels == (5,)
        assert level.largest_channel_share > 0.9
        assert level.first_position_ratio > 50
    # The giant is one number of a token; normalised, the others still count.
    assert audit.levels[1].raw_rank_floor(4) < 0.1 < audit.levels[1].rank_floor(4)


def test_massive_channels_are_named_by_size() -> None:
    teacher = with_giant(channel=2, value=-1500.0)
    with torch.no_grad():
        teacher.transformer.wpe.weight[0, 7] = 3000.0
    assert audited(teacher).levels[1].massive_channels == (7, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_the_cut_into_batches_do_not_matter(side: str) -> None:
    teacher = with_giant()
    whole = batches()
    joined = {name: torch.cat([b[name] for b in whole]) for name in whole[0]}
    plain = audited(teacher)
    other = audited(teacher, [padded(joined, 4, side)])
    assert other.tokens == plain.tokens
    for found, expected in zip(levels_of(other), levels_of(plain), strict=True):
        assert found.pop("token_norm") == pytest.approx(expected.pop("token_norm"), rel=1e-3)
        assert found == {
            name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in expected.items()
        }


def test_it_stops_after_max_tokens_and_reads_no_further() -> None:
    def endless() -> Any:
        yield from as_batches(batches(2))
        raise AssertionError("read on")

    teacher = BlockStack(tiny_teacher())
    assert audit_teacher(teacher, endless(), max_tokens=49).tokens == 96
    assert audit_teacher(teacher, as_batches(batches(2)), max_tokens=10**6).tokens == 96


def test_the_teacher_is_measured_without_dropout_and_left_as_it_was() -> None:
    teacher = tiny_teacher(resid_pdrop=0.5)
    expected = audited(teacher).to_json()
    teacher.train()
    assert audited(teacher).to_json() == expected
    assert all(module.training for module in teacher.modules())


def test_windows_of_one_token_have_no_other_position() -> None:
    audit = audited(tiny_teacher(), batches(seq_len=1))
    assert levels_of(audit)[0]["first_position_ratio"] is None
    assert json.loads(json.dumps(audit.to_json(), allow_nan=False)) == audit.to_json()
    assert audit.shown(16).splitlines()[1].split()[4] == "-"


def test_a_broken_teacher_is_named_with_the_level() -> None:
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.transformer.h[1].mlp.c_proj.bias[0] = torch.inf
    with pytest.raises(InputError, match="infinity at level 2 .the output of block 1"):
        audited(teacher)


def test_without_a_valid_position_there_is_no_audit() -> None:
    empty = batches(1)
    empty[0]["attention_mask"].zero_()
    for raw in ([], empty):
        with pytest.raises(InputError, match="No valid position"):
            audited(tiny_teacher(), raw)


def test_pooled_covariance_gives_each_level_the_same_weight() -> None:
    audit = audited(with_giant())
    pooled = audit.pooled_covariance()
    by_hand = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for states in states_of(with_giant()):
        covariance = token_normalised(states).flatten(0, 1).T.cov(correction=0)
        by_hand += covariance / covariance.trace() / (BLOCKS + 1)
    torch.testing.assert_close(pooled, by_hand.float(), rtol=1e-3, atol=1e-6)


def test_the_basis_is_orthonormal_leading_and_of_fixed_signs() -> None:
    root = torch.randn(12, 12)
    covariance = root @ torch.diag(2.0 ** -torch.arange(12)) @ root.T
    basis = pca_basis(covariance, 5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5))
    values = torch.linalg.eigvalsh(covariance).flip(0)[:5]
    torch.testing.assert_close(basis.T @ covariance @ basis, torch.diag(values), atol=1e-4, rtol=0)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(pca_basis(covariance.double(), 5).float(), basis)
    for width in (0, 13):
        with pytest.raises(UsageError, match=f"basis of {width} directions"):
            pca_basis(covariance, width)


def test_the_table_shows_the_floors_of_the_student_s_width() -> None:
    audit = audited(with_giant())
    lines = audit.shown(9).splitlines()
    assert "floor at width 9" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["embeddings", *["block"] * BLOCKS]
    for line, level in zip(lines[1:], audit.levels, strict=True):
        *_, floor, raw_floor, massive = line.split()
        assert (floor, raw_floor) == (
            f"{level.rank_floor(9):.4f}",
            f"{level.raw_rank_floor(9):.4f}",
        )
        assert massive == "5"


def test_floors_of_a_wide_teacher_are_written_at_some_widths_and_read_at_all() -> None:
    audit = audited(tiny_teacher(n_embd=260))
    content = audit.to_json()
    assert content["floor_widths"] == list(range(4, 261, 4))
    level = audit.levels[1]
    for width in (2, 4, 5, 128, 258, 260, 300):
        floor = float(audit.shown(width).splitlines()[2].split()[-3])
        assert floor == pytest.approx(level.rank_floor(width), abs=0.02 if width < 4 else 5e-3)


def written_run(folder: Path) -> dict[str, Any]:
    content = {**audited(with_giant()).to_json(), "student_width": 9}
    folder.mkdir()
    (folder / "audit.json").write_text(json.dumps(content))
    return content


def test_the_report_shows_the_audit_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillation.evaluation import plots
    from distillation.evaluation.report import write_report
    from tests.evaluation_samples import evaluated
    from tests.report_samples import write_run

    monkeypatch.setattr(plots, "matplotlib_available", lambda: False)  # drawing takes seconds
    audit = {**audited(with_giant()).to_json(), "student_width": 9}
    write_run(tmp_path / "run", audit=audit)
    result = evaluated()
    paths = write_report(result, tmp_path / "with", run_dir=tmp_path / "run")
    for name in ("report.md", "report.html"):
        text = paths[name].read_text()
        assert "The teacher's hidden states" in text or "The teacher&#39;s hidden states" in text
        assert "floor at width 9" in text
    without = write_report(result, tmp_path / "without", run_dir=tmp_path)
    assert "floor at width" not in without["report.md"].read_text()
    assert "floor at width" not in without["report.html"].read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "{",
        lambda content: json.dumps([1, 2]),
        lambda content: json.dumps({**content, "student_width": None}),
        lambda content: json.dumps({**content, "floor_widths": [1]}),
        lambda content: json.dumps({**content, "levels": [{"level": "<b>"}]}),
        lambda content: json.dumps(content).replace("[5]", '["<b>"]'),
    ],
)
def test_a_damaged_audit_costs_the_report_nothing_but_its_table(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from distillation.evaluation.audit_table import read_audit

    content = written_run(tmp_path / "run")
    assert read_audit(tmp_path / "run") is not None
    (tmp_path / "run" / "audit.json").write_text(damage(content))
    assert read_audit(tmp_path / "run") is None
    assert "goes without it" in caplog.text
