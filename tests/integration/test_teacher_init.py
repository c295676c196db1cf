"""The student starts from its teacher: exactly where it can, nearly where it is narrower."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cleangpt.blocks import BlockStack
from cleangpt.errors import UsageError
from distillation.audit import TeacherAudit, audit_teacher, pca_basis
from distillation.batch import as_batch
from distillation.head_init import untie_lm_head
from distillation.least_squares import LeastSquares
from distillation.losses.target_statistics import token_normalised
from distillation.shared_basis import slice_basis
from distillation.teacher_init import init_from_teacher
from distillation.teacher_weights import read_block
from tests.builders import (
    BLOCKS,
    STUDENTS,
    VOCAB,
    WIDTH,
    batches,
    tiny_student,
    unchanged,
    weights_of,
)
from tests.contract.source_tree import ROOT
from tests.integration.test_teacher_weights import applied, noisy_teacher

SAME_SHAPE = {"n_layer": BLOCKS, "n_embd": WIDTH, "n_head": 4, "bias": True}
IDS = batches(1, seed=9)[0]["input_ids"]
ALL_BLOCKS = range(BLOCKS)


def orthonormal(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.linalg.qr(torch.randn(WIDTH, width, generator=generator))[0]


def started(
    teacher: Any, student: Any, basis: Tensor | None = None, layers: Any = ALL_BLOCKS
) -> list[str]:
    how = "layers" if basis is None else "pca"
    return init_from_teacher(BlockStack(teacher), BlockStack(student), layers, how, basis)


def with_activation(kind: str, name: str, **fields: Any) -> Any:
    config = tiny_student(kind, **fields).config
    config.activation_function = name
    return type(tiny_student(kind))(config)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


# Equal widths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_student_of_the_teachers_shape_is_the_teacher(tied: bool) -> None:
    teacher = noisy_teacher("gpt2", tie_word_embeddings=tied)
    student = tiny_student(**SAME_SHAPE)
    if not tied:
        untie_lm_head(BlockStack(student))
    started(teacher, student)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    assert (student.lm_head.weight is student.wte.weight) is tied


def test_neurons_the_teacher_lacks_start_silent_but_can_learn() -> None:
    """OPT here has 64 neurons, the student 128; its positions are shifted by two as well."""
    teacher = noisy_teacher("opt")
    student = with_activation("Vanilla", "relu", **SAME_SHAPE)
    lines = started(teacher, student)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    assert "MLP, 64 of 64 neurons (all blocks)" in lines
    student(IDS, labels=IDS).loss.backward()
    assert student.blocks[0].mlp.down.weight.grad[:, 64:].abs().max() > 0


@pytest.mark.parametrize("how", ["pca", "slice"])
def test_at_equal_widths_every_start_copies_and_says_so(how: str) -> None:
    teacher, student = noisy_teacher("gpt2"), tiny_student(**SAME_SHAPE)
    lines = init_from_teacher(BlockStack(teacher), BlockStack(student), ALL_BLOCKS, how, None)
    assert lines[0] == "the widths are equal, so whole layers are copied"
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


def test_other_widths_are_refused_with_the_start_that_can() -> None:
    with pytest.raises(UsageError, match="widths are 16 and 32") as caught:
        started(noisy_teacher("gpt2"), tiny_student())
    assert "--init_from_teacher pca" in caught.value.remedy


def test_a_shallower_student_takes_the_first_block_of_each_group() -> None:
    teacher, student = noisy_teacher("gpt2"), tiny_student(**{**SAME_SHAPE, "n_layer": 2})
    lines = started(teacher, student, layers=(1, 2))
    assert "weights of the teacher's blocks 0, 2" in lines
    theirs, own = BlockStack(teacher), BlockStack(student.eval())
    state = torch.randn(*IDS.shape, WIDTH, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for index, source in enumerate((0, 2)):
            made = own.advance(index, state, IDS)
            torch.testing.assert_close(made, theirs.advance(source, state, IDS))


@pytest.mark.parametrize("layers", [(0, 0, 1, 2, 2), (0, 1, 1, 1, 2)])
def test_a_deeper_student_is_its_teacher_and_its_copies_learn(layers: tuple[int, ...]) -> None:
    teacher, student = noisy_teacher("gpt2"), tiny_student(**{**SAME_SHAPE, "n_layer": 5})
    lines = started(teacher, student, layers=layers)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    silent = [m for m in range(1, 5) if layers[m] == layers[m - 1]]
    named = ", ".join(map(str, silent))
    assert f"a copy of the block before, which writes nothing at first (blocks {named})" in lines
    student(IDS, labels=IDS).loss.backward()
    for block in silent:
        assert not student.blocks[block].mlp.down.weight.any()
        assert student.blocks[block].mlp.down.weight.grad.abs().max() > 0
        assert student.blocks[block].proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_deeper_narrow_student_starts_where_an_equally_deep_one_does(kind: str) -> None:
    teacher, basis = noisy_teacher("gpt2"), orthonormal(16)
    shape = {"n_embd": 16, "n_head": 4, "attn_gain": "fixed_one"}
    even, deep = (tiny_student(kind, **{**shape, "n_layer": n}) for n in (BLOCKS, 2 * BLOCKS))
    started(teacher, even, basis)
    started(teacher, deep, basis, layers=(0, 0, 1, 1, 2, 2))
    if kind != "Factored":  # whose attention moves its other stream once more
        torch.testing.assert_close(logits(deep), logits(even), rtol=1e-3, atol=1e-3)
    assert not deep.blocks[1].mlp.down.weight.any()
    assert deep.blocks[2].mlp.down.weight.any()


def test_what_has_no_place_is_said() -> None:
    lines = started(noisy_teacher("gpt2"), tiny_student(**{**SAME_SHAPE, "bias": False}))
    assert "not taken: biases, which the student's maps do not have (all blocks)" in lines
    lines = started(noisy_teacher("llama"), tiny_student(**SAME_SHAPE))
    assert "not taken: positions, which the teacher does not add to its embeddings" in lines
    assert "not taken: MLP: the teacher's is gated (all blocks)" in lines
    assert "not taken: final norm and head, which are of another kind" in lines
    lines = started(noisy_teacher("opt"), tiny_student(**SAME_SHAPE))
    assert "not taken: the MLP's activation, 'relu' in the teacher (all blocks)" in lines


# Narrower students --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "bloom", "llama"])
def test_what_enters_the_students_blocks_is_the_teachers_in_the_basis(family: str) -> None:
    """Multipliers, embedding norms and shifted positions included."""
    teacher, student, basis = noisy_teacher(family), tiny_student(n_layer=BLOCKS), orthonormal(16)
    positions = student.wpe.weight.clone()
    started(teacher, student, basis)
    ids = torch.arange(VOCAB)[:, None].expand(-1, 5)
    with torch.no_grad():
        wanted = BlockStack(teacher).embed(ids) @ basis
        if family in ("gpt2", "opt"):
            own = BlockStack(student.eval()).embed(ids)
        else:
            own = student.wte(ids)
            assert torch.equal(student.wpe.weight, positions)
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


def test_a_vocabulary_with_more_rows_keeps_its_own_in_the_rest() -> None:
    teacher, student = noisy_teacher("gpt2"), tiny_student(n_layer=BLOCKS, vocab_size=VOCAB + 5)
    before = student.wte.weight.clone()
    lines = started(teacher, student, orthonormal(16))
    assert lines[0] == f"embeddings of {VOCAB} tokens"
    assert torch.equal(student.wte.weight[VOCAB:], before[VOCAB:])


@torch.no_grad()
def writes_of_heads(teacher: Any, states: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """What some heads of block 0 add to the state, with everything that does not vary."""
    weights = read_block(BlockStack(teacher), 0).attention
    assert weights is not None
    normed = F.layer_norm(states, (WIDTH,))
    query, key, value = (
        applied(part, normed).unflatten(-1, (weights.num_heads, -1)).transpose(1, 2)
        for part in (weights.query, weights.key, weights.value)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    others = [head for head in range(weights.num_heads) if head not in chosen]
    constant = weights.value.bias.unflatten(0, (weights.num_heads, -1))
    mixed[:, others] = constant[others][None, :, None]
    return applied(weights.out, mixed.transpose(1, 2).flatten(2))


def test_fewer_and_wider_heads_hold_the_loudest_ones_exactly() -> None:
    """Two heads of 16 in place of four of 8: room enough for two of them, biases included."""
    teacher, student = noisy_teacher("gpt2"), tiny_student(**{**SAME_SHAPE, "n_head": 2})
    with torch.no_grad():  # two heads hardly write
        teacher.transformer.h[0].attn.c_proj.weight[0:8].mul_(0.1)
        teacher.transformer.h[0].attn.c_proj.weight[16:24].mul_(0.1)
    lines = started(teacher, student)
    assert "attention of 2 heads (all blocks)" in lines
    states = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(7))
    kept: dict[str, Tensor] = {}
    hook = student.blocks[0].proj.register_forward_hook(
        lambda module, args, output: kept.update(write=output)
    )
    with torch.no_grad():
        BlockStack(student.eval()).advance(0, states, torch.ones(2, 7, dtype=torch.long))
    hook.remove()
    expected = writes_of_heads(teacher, states, (1, 3))
    torch.testing.assert_close(kept["write"], expected, rtol=1e-4, atol=1e-4)


def test_narrower_heads_have_the_nearest_scores_and_writes() -> None:
    """No product of narrower maps is nearer to the teacher's, seen through the basis."""
    teacher, basis = noisy_teacher("gpt2"), orthonormal(16)
    student = tiny_student(n_layer=BLOCKS, n_head=4)
    started(teacher, student, basis)
    weights, block = read_block(BlockStack(teacher), 0).attention, student.blocks[0]
    assert weights is not None
    read = 2**0.5 * basis
    for head, (old, new) in enumerate(itertools.pairwise([0, 8, 16, 24, 32]), start=0):
        theirs, own = slice(old, new), slice(head * 4, head * 4 + 4)
        scores = read.T @ weights.query.weight[theirs].T @ weights.key.weight[theirs] @ read
        write = basis.T @ weights.out.weight[:, theirs] @ weights.value.weight[theirs] @ read
        pairs = (
            (
                scores / 8**0.5,
                block.attention.query.weight[own].T @ block.attention.key.weight[own] / 4**0.5,
            ),
            (write, block.proj.weight[:, own] @ block.value.weight[own]),
        )
        for wanted, made in pairs:
            best = torch.linalg.svdvals(wanted)[4:].square().sum().sqrt()
            torch.testing.assert_close((made - wanted).norm(), best, rtol=1e-3, atol=1e-5)


def test_a_narrower_student_keeps_the_loudest_neurons() -> None:
    teacher, student = noisy_teacher("gpt2"), tiny_student(n_layer=BLOCKS)
    loud = list(range(1, 128, 2))
    with torch.no_grad():
        teacher.transformer.h[0].mlp.c_proj.weight[::2] *= 1e-3
    started(teacher, student, orthonormal(16))
    weights = read_block(BlockStack(teacher), 0).mlp
    assert weights is not None
    expected = weights.up.weight[loud] @ orthonormal(16) * 2**0.5
    torch.testing.assert_close(student.blocks[0].mlp.up.weight.detach(), expected)


def test_sasp_takes_the_mlp_at_the_size_its_blocks_pass_on() -> None:
    """The teacher adds to a state of its own size, SASP to the same at unit size."""
    teacher = noisy_teacher("gpt2")
    student = with_activation("SASP", "gelu_pytorch_tanh", **SAME_SHAPE)
    before = weights_of(student)
    started(teacher, student)
    weights, block = read_block(BlockStack(teacher), 1).mlp, student.blocks[1]
    assert weights is not None
    normed = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        state = BlockStack(teacher).state_entering(1, IDS)
        theirs = applied(weights.down, F.gelu(applied(weights.up, normed), approximate="tanh"))
        ratio = theirs / (block.beta_ff * block.mlp(normed))
    assert ratio.std() < 1e-3 * ratio.mean()
    assert ratio.mean() == pytest.approx(float(state.square().mean().sqrt()), rel=0.2)
    kept = unchanged(before, weights_of(student))
    assert {"blocks.1.attention.query.weight", "blocks.1.attention.key.weight"} <= kept


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_teacher_is_left_as_it_was(kind: str) -> None:
    teacher, student = noisy_teacher("gpt2").train(), tiny_student(kind, n_layer=BLOCKS)
    before = weights_of(teacher)
    started(teacher, student, orthonormal(16))
    assert unchanged(before, weights_of(teacher)) == set(before)
    assert all(module.training for module in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert torch.isfinite(logits(student)).all()


def test_a_slice_is_the_channels_that_vary_most() -> None:
    basis = slice_basis(torch.diag(torch.tensor([1.0, 5.0, 0.1, 3.0])), 2)
    assert torch.equal(basis, torch.eye(4)[:, [1, 3]])
    with pytest.raises(UsageError, match="5 channels does not fit in the teacher's width 4"):
        slice_basis(torch.eye(4), 5)


# A trained teacher --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """The built-in teacher, its audit, windows of English text and what it makes of them."""

    stack: BlockStack
    audit: TeacherAudit
    ids: Tensor
    last_states: Tensor

    @torch.no_grad()
    def error(self, student: Any) -> float:
        """Held-out error of the best linear read-out of the last block, 1 for a constant."""
        own = BlockStack(student.eval()).block_hidden_states(self.ids)[-1].double()
        split, sums = 3 * len(own) // 4, LeastSquares()
        sums.add(own[:split].flatten(0, 1), self.last_states[:split].flatten(0, 1))
        weight, bias = sums.regression()
        wanted = self.last_states[split:].flatten(0, 1)
        rest = wanted - (own[split:].flatten(0, 1) @ weight.T + bias)
        return float(rest.square().sum() / (wanted - wanted.mean(0)).square().sum())

    def student(self, kind: str, **changes: Any) -> Any:
        """A student of half the teacher's width."""
        shape = {"n_layer": 6, "n_head": 6, "n_embd": 96, "block_size": 64}
        return tiny_student(kind, **{**shape, "vocab_size": self.stack.vocab_size, **changes})

    def start(self, student: Any, how: str) -> None:
        """Start it in the basis that the setting stands for."""
        find = {"pca": pca_basis, "slice": slice_basis}[how]
        basis = find(self.audit.pooled_covariance(), 96)
        init_from_teacher(self.stack, BlockStack(student), range(6), how, basis)


@pytest.fixture(scope="module")
def trained() -> Trained:
    from cleangpt.teacher import load_teacher

    loaded = load_teacher("builtin")
    stack = BlockStack(loaded.model)
    text = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"])[: 40 * 64].view(40, 64)
    with torch.no_grad():
        states = token_normalised(stack.block_hidden_states(ids)[-1]).double()
    audit = audit_teacher(stack, [as_batch(ids[:16], torch.device("cpu"))])
    return Trained(stack, audit, ids, states)


@pytest.mark.parametrize("kind", STUDENTS)
def test_half_the_width_starts_far_from_random(kind: str, trained: Trained) -> None:
    student = trained.student(kind)
    random = trained.error(student)
    trained.start(student, "pca")
    assert trained.error(student) < (0.7 if kind == "Vanilla" else 0.8) * random


def test_main_directions_are_better_than_channels(trained: Trained) -> None:
    errors = {}
    for how in ("pca", "slice"):
        student = trained.student("Vanilla")
        trained.start(student, how)
        errors[how] = trained.error(student)
    assert errors["pca"] < 0.9 * errors["slice"]


def test_half_the_blocks_start_far_from_random(trained: Trained) -> None:
    """The last block of each group would not: it expects states that no block has made."""
    student = trained.student("Vanilla", n_layer=3, n_embd=192)
    random = trained.error(student)
    init_from_teacher(trained.stack, BlockStack(student), (1, 3, 5), "layers", None)
    assert trained.error(student) < 0.6 * random
