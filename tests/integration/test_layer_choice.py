"""The blocks that a teacher can least do without, and the student that starts from them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError
from distillation.block_costs import block_costs
from distillation.layer_map import measured_layer_map, uniform_layer_map
from distillation.teacher_init import first_of_groups
from tests.builders import batches, padded, tiny_teacher
from tests.saved_teachers import build, save


@torch.no_grad()
def logits_without(teacher: Any, block: int, ids: torch.Tensor) -> torch.Tensor:
    shorter = copy.deepcopy(teacher)
    layers = [layer for index, layer in enumerate(shorter.transformer.h) if index != block]
    shorter.transformer.h = nn.ModuleList(layers)
    return shorter(ids, use_cache=False).logits


@torch.no_grad()
def test_a_cost_is_the_divergence_of_the_teacher_without_the_block() -> None:
    teacher, batch = tiny_teacher().train(), batches(1)[0]
    found = block_costs(BlockStack(teacher), [batch])
    assert all(module.training for module in teacher.modules())
    teacher.eval()
    target = teacher(batch["input_ids"]).logits.log_softmax(-1)
    for block, cost in enumerate(found):
        own = logits_without(teacher, block, batch["input_ids"]).log_softmax(-1)
        expected = F.kl_div(own, target, reduction="none", log_target=True).sum(-1).mean()
        assert cost == pytest.approx(float(expected), rel=1e-4)


def test_padding_and_further_batches_do_not_count() -> None:
    stack, data = BlockStack(tiny_teacher()), batches(2)
    alone = block_costs(stack, data[:1])
    assert block_costs(stack, [padded(data[0], 3)]) == pytest.approx(alone, rel=1e-4)
    assert block_costs(stack, data, max_tokens=48) == alone
    assert block_costs(stack, data, max_tokens=49) != alone
    empty = {**data[0], "attention_mask": torch.zeros_like(data[0]["attention_mask"])}
    assert block_costs(stack, [empty, data[0]]) == alone
    with pytest.raises(InputError, match="no valid position"):
        block_costs(stack, [empty])


def test_a_block_that_does_nothing_is_left_out() -> None:
    teacher = tiny_teacher(n_layer=5)
    with torch.no_grad():
        for layer in (teacher.transformer.h[1], teacher.transformer.h[3]):
            for part in (layer.attn.c_proj, layer.mlp.c_proj):
                part.weight.zero_()
                part.bias.zero_()
    costs = block_costs(BlockStack(teacher), batches(1))
    assert costs[1] == pytest.approx(0, abs=1e-6)
    found = measured_layer_map(costs, 3)
    assert found == (1, 3, 4)
    assert first_of_groups(found) == [0, 2, 4]


def test_a_map_begins_its_groups_with_the_dearest_blocks() -> None:
    costs = [0.1, 0.5, 0.2, 0.9, 0.3]
    for blocks in range(1, 8):
        found = measured_layer_map(costs, blocks)
        assert len(found) == blocks
        assert found[-1] == len(costs) - 1
        if blocks >= len(costs):
            assert found == uniform_layer_map(blocks, len(costs))
    starts = [first_of_groups(measured_layer_map(costs, blocks)) for blocks in (1, 2, 3)]
    assert starts == [[0], [0, 3], [0, 1, 3]]


def test_the_command_measures_once_and_goes_on_with_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from distillation.commands.distil import distil
    from distillation.commands.settings import parse_arguments

    model = build("gpt2")
    model.transformer.h.append(copy.deepcopy(model.transformer.h[1]))
    model.config.n_layer = 3
    place = save(tmp_path / "teacher", model)
    (tmp_path / "text.txt").write_text("\n\n".join(f"line {i} of a text" for i in range(60)))
    flags = ["--teacher_model_name_or_path", place, "--dataset_name", str(tmp_path / "text.txt")]
    flags += ["--block_size", "16", "--student_n_layer", "2", "--student_n_embd", "16"]
    flags += ["--layer_map", "measured", "--device", "cpu", "--epochs_per_block", "1"]
    flags += ["--output_dir", str(tmp_path / "run")]
    found = iter([(0.9, 0.1, 0.5), (0.9, 0.5, 0.1)])
    monkeypatch.setattr("distillation.block_costs.block_costs", lambda *_: next(found))
    caplog.set_level("INFO")
    distil(parse_arguments([*flags, "--checkpoint_steps", "1"]))
    assert "Student block -> teacher block: {0: 1, 1: 2}" in caplog.text
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["layer_map"] == [1, 2]
    results, _ = distil(parse_arguments([*flags, "--checkpoint_steps", "1", "--resume"]))
    assert [row["teacher_block"] for row in results["blocks"]] == [1, 2]
    assert next(found) == (0.9, 0.5, 0.1)  # not measured again


@pytest.mark.slow
def test_the_doctor_takes_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distillation.commands.doctor import main

    flags = ["--layer_map", "measured", "--student_n_layer", "2"]
    main([*flags, "--max_samples", "3", "--output_dir", str(tmp_path / "run"), "--device", "cpu"])
    assert "0 failures" in capsys.readouterr().out


def test_a_plan_has_a_uniform_map(capsys: pytest.CaptureFixture[str]) -> None:
    from distillation.commands.distil import main

    main(["--plan", "--layer_map", "measured", "--student_n_layer", "2"])
    assert "block-01" in capsys.readouterr().out
    flags = ["--plan_device", "h100", "--teacher_config", "llama-3-8b", "--plan_tokens", "1e6"]
    main(["--plan", *flags, "--layer_map", "measured", "--student_n_layer", "2"])
    assert "device hours" in capsys.readouterr().out
