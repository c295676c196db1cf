"""A student of the teacher's own architecture: exact copies, and what a smaller one keeps."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.families import tiny_model
from cleangpt.blocks import BlockStack
from distillation.layer_map import uniform_layer_map
from distillation.teacher_init import first_of_groups, init_from_teacher
from tests.builders import BLOCKS, FAMILIES, VOCAB, WIDTH, batches, tiny_teacher
from tests.integration.test_teacher_weights import noisy_teacher

IDS = batches(1, seed=9)[0]["input_ids"]
RMS_NORMED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite")
LAYER_NORMED = ("gpt2", "opt", "starcoder2", "gpt_neox")


def like(teacher: Any, **changes: Any) -> Any:
    """A random model of the teacher's class, its configuration changed here and there."""
    torch.manual_seed(5)
    config = type(teacher.config)(**{**teacher.config.to_dict(), **changes})
    return type(teacher)(config).eval()


def started(teacher: Any, student: Any, basis: Tensor | None = None) -> list[str]:
    stacks = BlockStack(teacher), BlockStack(student)
    layers = uniform_layer_map(stacks[1].num_blocks, BLOCKS)
    return init_from_teacher(*stacks, layers, "layers" if basis is None else "pca", basis)


def rotation() -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return BlockStack(model.eval()).logits(IDS)


@torch.no_grad()
def states(model: Any) -> Tensor:
    return torch.stack(BlockStack(model).block_hidden_states(IDS))


# Equal sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_of_the_teachers_shape_is_the_teacher(family: str) -> None:
    teacher = noisy_teacher(family)
    student = like(teacher)
    assert not torch.equal(logits(student), logits(teacher))
    started(teacher, student)
    assert torch.equal(logits(student), logits(teacher))
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_an_untied_head_and_other_numbers_of_rows_are_copied_too() -> None:
    teacher = noisy_teacher("gpt2")
    student = like(teacher, tie_word_embeddings=False, n_positions=16, vocab_size=VOCAB + 5)
    own = student.lm_head.weight[VOCAB:].clone()
    started(teacher, student)
    torch.testing.assert_close(logits(student)[..., :VOCAB], logits(teacher))
    assert torch.equal(student.lm_head.weight[VOCAB:], own)


def test_a_tied_head_stays_the_embeddings() -> None:
    teacher = noisy_teacher("llama", tie_word_embeddings=False)
    student = like(teacher, tie_word_embeddings=True)
    lines = started(teacher, student)
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert "not taken: the head, which is tied to the embeddings in the student" in lines


@pytest.mark.parametrize("family", ["glm4_moe", "jamba", "gemma4_text", "lfm2_moe"])
def test_blocks_unlike_each_other_are_copied_too(family: str) -> None:
    teacher, student = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    lines = started(teacher, student)
    assert "whole layers are copied" in lines[0]
    assert torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize("family", ["mixtral", "gptj", "mpt"])
def test_copies_that_cannot_be_silent_are_said_to_write_again(family: str) -> None:
    teacher = tiny_model(family)
    depth = BlockStack(teacher).num_blocks
    name = "n_layers" if family == "mpt" else "n_layer" if family == "gptj" else "num_hidden_layers"
    student = like(teacher, **{name: 2 * depth})
    stacks = BlockStack(teacher), BlockStack(student)
    lines = init_from_teacher(*stacks, uniform_layer_map(2 * depth, depth), "layers", None)
    assert any("writes the same again (blocks 1, 3, 5)" in line for line in lines)
    assert not any("writes nothing" in line for line in lines)


def test_a_shallower_one_starts_as_the_first_blocks_of_its_groups() -> None:
    teacher = noisy_teacher("llama")
    student = like(teacher, num_hidden_layers=2)
    lines = started(teacher, student)
    sources = first_of_groups(uniform_layer_map(2, BLOCKS))
    assert f"weights of the teacher's blocks {sources[0]}, {sources[1]}" in lines
    without = copy.deepcopy(teacher)
    without.model.layers = without.model.layers[sources[0] : sources[1] + 1 : sources[1]]
    without.config.num_hidden_layers = 2
    assert torch.equal(logits(student), logits(without))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_deeper_one_is_its_teacher_and_its_copies_learn(family: str) -> None:
    teacher = noisy_teacher(family)
    student = like(teacher, num_hidden_layers=2 * BLOCKS)
    lines = started(teacher, student)
    assert any("which writes nothing at first (blocks 1, 3, 5)" in line for line in lines)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    student(input_ids=IDS, labels=IDS).loss.backward()
    blocks = [BlockStack(student).block(index) for index in range(2 * BLOCKS)]
    assert all(any(p.grad.abs().max() > 0 for p in block.parameters()) for block in blocks)


def test_blocks_that_look_at_other_positions_are_named() -> None:
    teacher = noisy_teacher("gemma3", layer_types=["sliding_attention"] * 2 + ["full_attention"])
    student = like(teacher, layer_types=["sliding_attention"] * BLOCKS)
    said = [line for line in started(teacher, student) if line.startswith("not the teacher's")]
    assert said == [
        "not the teacher's: layer_types of the student's blocks"
        " 2 (sliding_attention, from full_attention)"
    ]


@pytest.mark.parametrize(
    ("family", "setting", "own", "theirs"),
    [("llama", "hidden_act", "gelu", "silu"), ("gpt2", "layer_norm_epsilon", 0.1, 1e-5)],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_settings_by_which_the_same_weights_compute_something_else_are_named(
    family: str, setting: str, own: Any, theirs: Any, rotated: bool
) -> None:
    teacher = noisy_teacher(family)
    student = like(teacher, **{setting: own})
    said = started(teacher, student, rotation() if rotated else None)
    assert f"not the teacher's: {setting} is {own}, and {theirs} in the teacher" in said
    assert not torch.equal(logits(student), logits(teacher))
    said = started(teacher, like(teacher), rotation() if rotated else None)
    assert not any(line.startswith("not the teacher's") for line in said)


def test_a_norm_of_embeddings_that_a_narrower_student_cannot_take_is_named() -> None:
    teacher = noisy_teacher("bloom")
    said = started(teacher, like(teacher, hidden_size=16, n_head=4), torch.eye(WIDTH)[:, :16])
    assert "not taken: what the student does to its embeddings besides scaling them" in said
    said = started(teacher, like(teacher))
    assert not any("besides scaling" in line for line in said)


# Other sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RMS_NORMED)
def test_rotated_it_computes_the_same(family: str) -> None:
    """Multipliers, gains of either kind, biases of queries, groups of heads and gates included."""
    teacher = noisy_teacher(family)
    student = like(teacher)
    started(teacher, student, rotation())
    torch.testing.assert_close(states(student), states(teacher) @ rotation(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", LAYER_NORMED)
def test_rotated_with_layer_norms_it_computes_nearly_the_same(family: str) -> None:
    """Such a norm subtracts the mean over channels, which the rotation moves."""
    teacher = noisy_teacher(family)
    student, other = like(teacher), like(teacher)
    started(teacher, student, rotation())
    wanted = states(teacher) @ rotation()
    assert (states(student) - wanted).norm() < 0.15 * wanted.norm()
    assert (states(other) - wanted).norm() > 0.9 * wanted.norm()


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_the_heads_and_neurons_that_write_are_kept(groups: int) -> None:
    """Half of the teacher's heads, and of its neurons, write nothing: it loses nothing of them."""
    teacher = noisy_teacher("llama")
    silent_heads = (0, 1) if groups == 1 else (1, 2)
    for layer in teacher.model.layers:
        for head in silent_heads:
            layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
        layer.mlp.down_proj.weight[:, ::2] = 0
    sizes = {"num_attention_heads": 2, "num_key_value_heads": groups, "head_dim": 8}
    student = like(teacher, **sizes, intermediate_size=32)
    lines = started(teacher, student)
    assert "attention of 2 heads (all blocks)" in lines
    assert "MLP, 32 of 64 neurons (all blocks)" in lines
    torch.testing.assert_close(states(student), states(teacher), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 16}, "not taken: attention, whose heads are 8 wide in the teacher"),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8},
            "not taken: attention, of which the student has more heads",
        ),
    ],
)
def test_heads_that_do_not_fit_are_named(changes: dict[str, int], said: str) -> None:
    teacher = noisy_teacher("llama")
    lines = started(teacher, like(teacher, **changes))
    assert f"{said} (all blocks)" in lines
    assert "MLP, 64 of 64 neurons (all blocks)" in lines


@pytest.mark.parametrize("family", ["gemma3_text", "olmo", "qwen2_moe", "gpt_oss", "openai-gpt"])
def test_a_layout_that_is_not_known_is_named_and_left_alone(family: str) -> None:
    """Norms behind the parts or without gains, experts, sinks."""
    teacher, student = tiny_model(family), tiny_model(family)
    before = [p.clone() for p in BlockStack(student).block(0).parameters()]
    width = BlockStack(teacher).hidden_size
    lines = started(teacher, student, torch.eye(width).flip(0))
    assert "not taken: blocks, whose layout is not known here (all blocks)" in lines
    after = BlockStack(student).block(0).parameters()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_embeddings_of_another_width_than_the_states_are_named() -> None:
    teacher = tiny_teacher("opt", word_embed_proj_dim=16)
    lines = started(teacher, like(teacher), rotation())
    assert "not taken: embeddings, which are of another width than the states" in lines


def test_half_precision_does_not_hide_a_multiplier() -> None:
    teacher, student = noisy_teacher("llama"), noisy_teacher("gemma").bfloat16()
    started(teacher, student, rotation())
    with torch.no_grad():
        wanted = BlockStack(teacher).embed(IDS) @ rotation()
        own = BlockStack(student).embed(IDS).float()
    assert (own - wanted).abs().max() < 0.02 * wanted.abs().max()


# Another architecture -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma", "opt"])
def test_what_enters_another_familys_blocks_is_the_teachers(family: str) -> None:
    """Gemma multiplies its embeddings, and OPT's positions begin at its third row."""
    teacher, student = noisy_teacher("gpt2" if family == "opt" else "llama"), noisy_teacher(family)
    lines = started(teacher, student, rotation())
    said = "not taken: blocks, since the student's are of another kind and name no parts"
    assert f"{said} (all blocks)" in lines
    with torch.no_grad():
        wanted = BlockStack(teacher).embed(IDS) @ rotation()
        own = BlockStack(student).embed(IDS)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_left_as_it_was() -> None:
    for basis in (None, rotation()):
        teacher = noisy_teacher("llama").train()
        before = {name: each.clone() for name, each in teacher.state_dict().items()}
        student = like(teacher)
        started(teacher, student, basis)
        student.model.embed_tokens.weight.data.add_(1.0)
        assert all(torch.equal(before[name], each) for name, each in teacher.state_dict().items())
        assert all(module.training for module in teacher.modules())


def test_a_tiny_teacher_differs_between_seeds() -> None:
    """The copies above would mean nothing between models that are equal to begin with."""
    assert not torch.equal(logits(tiny_teacher("llama")), logits(tiny_teacher("llama", seed=8)))
