"""The three students compute the published equations, and every option acts."""

import logging

import pytest
import torch
from torch import Tensor

from config_distillation import GPTConfig
from model import STUDENTS, StudentModel, build_student, get_model_class
from model.model_SASPV_distillation import SASPBlock
from tests.reference_students import (
    KINDS,
    noisy_student,
    reference_logits,
    student_config,
    tokens,
)

OPTIONS: list[dict[str, object]] = [
    {},
    {"bias": True},
    {"use_v": True, "use_proj": True},
    {"use_channel_factor_v": True, "use_channel_factor_proj": True},
    {"use_v": True, "use_channel_factor_proj": True, "bias": True},
    {"attn_gain": "fixed_one"},
    {"head_rank": 5},
    {"final_norm": "folded"},
    {"final_norm": "folded", "head_rank": 5},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_and_hidden_states_follow_the_equations(
    kind: str, options: dict[str, object]
) -> None:
    student = noisy_student(kind, **options)
    ids = tokens(1, 11)
    output = student(ids, output_hidden_states=True)
    hidden, logits = reference_logits(student, ids[0].tolist())
    torch.testing.assert_close(output.logits[0].double(), logits, atol=2e-5, rtol=1e-5)
    assert len(output.hidden_states) == student.config.n_layer + 1
    for found, expected in zip(output.hidden_states[:-1], hidden[:-1], strict=True):
        torch.testing.assert_close(found[0].double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_hidden_state_is_after_the_final_norm(kind: str) -> None:
    student = noisy_student(kind)
    raw: list[Tensor] = []
    student.final_norm.register_forward_pre_hook(lambda _, args: raw.append(args[0]))
    states: list[Tensor] = []
    student.blocks[-1].register_forward_hook(lambda _, __, state: states.append(state))
    output = student(tokens(2, 5), output_hidden_states=True)
    assert torch.equal(student.final_norm(raw[0]), output.hidden_states[-1])
    assert torch.equal(student.read_hidden_states(states[0]), raw[0])
    assert torch.equal(student.lm_head(output.hidden_states[-1]), output.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_attention_agrees_and_returns_its_weights(kind: str) -> None:
    student = noisy_student(kind)
    ids = tokens(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    fused = student(ids, attention_mask=mask)
    recorded = student(ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(recorded.logits, fused.logits, atol=1e-5, rtol=1e-5)
    assert len(recorded.attentions) == 3
    weights = recorded.attentions[0]
    assert weights.shape == (2, 3, 7, 7)
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    assert torch.equal(weights[0, :, 2:, :2], torch.zeros(3, 5, 2))
    student.config._attn_implementation = "eager"
    torch.testing.assert_close(student(ids).logits, noisy_student(kind)(ids).logits)


@pytest.mark.parametrize(
    ("kind", "n_embd", "millions"),
    [("Vanilla", 384, 40.9), ("Vanilla", 512, 64.0), ("Vanilla", 576, 77.3)]
    + [(kind, n, size) for kind in ("SASP", "Factored") for n, size in ((384, 37.4), (640, 82.0))],
)
def test_parameter_budgets_at_gpt2_scale(kind: str, n_embd: int, millions: float) -> None:
    config = GPTConfig(
        model_type=kind,
        vocab_size=50257,
        block_size=1024,
        n_layer=12,
        n_embd=n_embd,
        n_head=n_embd // 64,
    )
    with torch.device("meta"):
        student = build_student(config)
    assert student.get_num_params() / 1e6 == pytest.approx(millions, abs=0.05)


def size_of(kind: str, **fields: object) -> int:
    return build_student(student_config(kind, **fields)).get_num_params()


@pytest.mark.parametrize("kind", ["Factored", "SASP"])
def test_value_and_output_maps_are_added_to_the_lean_students(kind: str) -> None:
    base, per_block = size_of(kind), 3
    for dense, kronecker in (
        ("use_v", "use_channel_factor_v"),
        ("use_proj", "use_channel_factor_proj"),
    ):
        assert size_of(kind, **{dense: True}) - base == per_block * 24 * 24
        assert size_of(kind, **{kronecker: True}) - base == per_block * 3 * 3
        assert size_of(kind, **{dense: True, kronecker: True}) - base == per_block * 3 * 3


def test_kronecker_maps_replace_the_dense_ones_of_vanilla(
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = size_of("Vanilla")
    for name in ("use_channel_factor_v", "use_channel_factor_proj"):
        assert size_of("Vanilla", **{name: True}) - base == 3 * (3 * 3 - 24 * 24)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert size_of("Vanilla", use_v=True) == base
    assert "always has a value matrix" in caplog.text


@pytest.mark.parametrize("kind", ["Factored", "SASP"])
def test_optional_maps_do_not_change_a_new_student(kind: str) -> None:
    plain = build_student(student_config(kind)).eval()
    ids = tokens(2, 9)
    for options in OPTIONS[2:4]:
        other = build_student(student_config(kind, **options)).eval()
        other.load_state_dict(plain.state_dict(), strict=False)
        torch.testing.assert_close(other(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_remaining_options_act(kind: str) -> None:
    assert size_of(kind, bias=True) > size_of(kind)
    assert size_of(kind, block_size=25) - size_of(kind) == 24
    gains = {"Vanilla": 0, "Factored": 3 * 3, "SASP": 3 * 3 * 3}[kind]
    assert size_of(kind) - size_of(kind, attn_gain="fixed_one") == gains
    student = build_student(
        student_config(kind, padding_idx=0, output_hidden_states=True, teacher_n_embd=48)
    ).eval()
    assert student(tokens(1, 4)).hidden_states is not None
    assert student(tokens(1, 4), output_hidden_states=False).hidden_states is None
    assert student.config.pad_token_id == student.generation_config.pad_token_id == 0
    assert student.config.teacher_n_embd == 48
    assert student.wte.weight[0].abs().sum() > 0, "the padding token may be a real token"
    shown = [student.config.hidden_size, student.config.num_hidden_layers]
    shown += [student.config.num_attention_heads, student.config.max_position_embeddings]
    assert shown == [24, 3, 3, 24]


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only(kind: str) -> None:
    torch.manual_seed(0)
    student = build_student(student_config(kind, dropout=0.3))
    ids = tokens(2, 6)
    assert not torch.equal(student(ids).logits, student(ids).logits)
    student.eval()
    assert torch.equal(student(ids).logits, student(ids).logits)


def test_a_new_sasp_block_passes_its_norm_on_and_adds_only_the_mlp() -> None:
    student = build_student(student_config("SASP")).eval()
    block = student.blocks[0]
    assert isinstance(block, SASPBlock)
    torch.nn.init.zeros_(block.beta_ff)
    states: list[Tensor] = []
    block.register_forward_hook(lambda _, args, out: states.extend((args[0], out)))
    student(tokens(2, 9))
    torch.testing.assert_close(states[1], block.norm(states[0]), atol=1e-6, rtol=1e-5)
    assert student.blocks[1].beta_ff.item() == pytest.approx(0.1 * (18 / 3) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_of_head_have_the_sizes_that_their_equations_say(kind: str) -> None:
    vocab, width, tied = 41, 24, size_of(kind)
    assert size_of(kind, head_rank=5) - tied == 5 * (width + vocab)
    folded = (width + 1) ** 2 - 2 * width
    assert size_of(kind, final_norm="folded") - tied == folded + vocab * (width + 1) + vocab
    both = folded + 5 * (width + 1 + vocab) + vocab
    assert size_of(kind, final_norm="folded", head_rank=5) - tied == both


def test_a_new_folded_norm_is_the_rms_norm_of_the_state_and_a_constant() -> None:
    student = build_student(student_config("Vanilla", final_norm="folded"))
    state = torch.randn(4, 24)
    extended = torch.cat([state, torch.ones(4, 1)], dim=1)
    expected = extended / (extended.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(student.final_norm(state), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_layer", [12, 24])
def test_deep_new_students_keep_tokens_apart(kind: str, n_layer: int) -> None:
    torch.manual_seed(0)
    config = student_config(kind, n_layer=n_layer, n_embd=64, n_head=4, block_size=64)
    student = build_student(config).eval()
    states: list[Tensor] = []
    student.blocks[-1].register_forward_hook(lambda _, __, out: states.append(out))
    student(tokens(2, 64))
    hidden = student.read_hidden_states(states[0])
    rms = hidden.pow(2).mean().sqrt().item()
    normed = torch.nn.functional.normalize(hidden - hidden.mean(-1, keepdim=True), dim=-1)
    cosines = normed @ normed.transpose(1, 2)  # (2, T, T)
    similarity = (cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()) / (2 * 64 * 63)
    assert 0.01 < rms < 10
    assert similarity < 0.9


def test_the_published_factored_form_collapses_with_depth() -> None:
    """Why the default deviates: with unit gain all positions look alike after twelve blocks."""
    torch.manual_seed(0)
    config = student_config("Factored", n_layer=12, n_embd=64, n_head=4, attn_gain="fixed_one")
    student = build_student(config).eval()
    states: list[Tensor] = []
    student.blocks[-1].register_forward_hook(lambda _, __, out: states.append(out))
    student(tokens(1, 24))
    last = torch.nn.functional.normalize(student.read_hidden_states(states[0])[0, 4:], dim=-1)
    assert (last @ last.T).mean() > 0.9


def test_the_registry_knows_the_three_students_in_any_case() -> None:
    assert set(STUDENTS) >= {"Vanilla", "Factored", "SASP"}
    assert get_model_class("sasp") is get_model_class("SASP") is STUDENTS["SASP"]
    assert all(issubclass(student, StudentModel) for student in STUDENTS.values())
    with pytest.raises(ValueError, match=r"Unsupported student model type: GRU\n.*Factored, SASP"):
        get_model_class("GRU")


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_needs_a_vocabulary_and_known_settings(kind: str) -> None:
    with pytest.raises(ValueError, match=r"needs vocab_size, which is None\.\nSet vocab_size"):
        get_model_class(kind)(config=GPTConfig())
    config_class = get_model_class(kind).config_class
    other = get_model_class("SASP" if kind == "Vanilla" else "Vanilla")
    with pytest.raises(ValueError, match=f"cannot be built from a {kind}Config"):
        other(config_class(vocab_size=9))
    with pytest.raises(ValueError, match=r"has no setting n_layers\.\nDid you mean 'n_layer'\?"):
        config_class(n_layers=3)
    with pytest.raises(ValueError, match="n_embd=100 is not a multiple of n_head=6"):
        config_class(n_embd=100)
    with pytest.raises(ValueError, match="attn_gain='none' is unknown"):
        config_class(attn_gain="none")
    with pytest.raises(ValueError, match="final_norm='rms' is unknown"):
        config_class(final_norm="rms")
    for rank in (0, 25):
        with pytest.raises(ValueError, match=f"head_rank={rank} is not between 1 and 24"):
            config_class(n_embd=24, n_head=3, head_rank=rank)
    with pytest.raises(ValueError, match="head_rank=10 is not between 1 and 9"):
        config_class(vocab_size=9, head_rank=10)
    for fields in ({"head_rank": 4}, {"final_norm": "folded"}):
        assert config_class(**fields).tie_word_embeddings is False
        with pytest.raises(ValueError, match=r"cannot be the embedding matrix\.\nLeave tie_word"):
            config_class(tie_word_embeddings=True, **fields)
    assert config_class().tie_word_embeddings is True
    assert config_class(tie_word_embeddings=False).tie_word_embeddings is False
