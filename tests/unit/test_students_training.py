"""Loss, gradients, precision and tying."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cleangpt.blocks import BlockStack
from distillation.head_init import untie_lm_head
from model import StudentModel, build_student, get_model_class
from tests.reference_students import KINDS, VOCAB, noisy_student, student_config, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_shifts_labels_as_huggingface_does(kind: str) -> None:
    student, ids = noisy_student(kind), tokens(3, 8)
    labels = ids.clone()
    labels[0, 5:] = -100
    output = student(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    summed = student(ids, labels=labels, num_items_in_batch=4).loss
    torch.testing.assert_close(summed, expected * (7 * 3 - 3) / 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("final_norm", ["layer_norm", "folded"])
@pytest.mark.parametrize("head_rank", [None, 5])
def test_every_parameter_learns(kind: str, final_norm: str, head_rank: int | None) -> None:
    student = noisy_student(
        kind,
        bias=True,
        use_v=True,
        use_proj=True,
        use_channel_factor_v=True,
        final_norm=final_norm,
        head_rank=head_rank,
    ).train()
    ids = tokens(3, 8)
    student(ids, labels=ids).loss.backward()
    # A bias of the keys shifts all scores of a query alike, which the softmax does not see.
    silent = [
        name
        for name, p in student.named_parameters()
        if (p.grad is None or not p.grad.abs().sum() > 0) and not name.endswith("key.bias")
    ]
    assert silent == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [{}, {"head_rank": 8}, {"final_norm": "folded"}], ids=str)
def test_a_new_student_learns_a_batch(kind: str, head: dict[str, Any]) -> None:
    torch.manual_seed(0)
    student = build_student(student_config(kind, **head))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    ids = tokens(4, 12)
    first = last = student(ids, labels=ids).loss
    for _ in range(60):
        optimizer.zero_grad()
        last = student(ids, labels=ids).loss
        last.backward()
        optimizer.step()
    assert last < 0.3 * first


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    plain = noisy_student(kind).train()
    saving = copy.deepcopy(plain)
    # The old name is deprecated in the newest transformers, which has a new one.
    old_name = "gradient_checkpointing_enable"
    getattr(saving, "activation_checkpointing_enable", getattr(saving, old_name))()
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    calls: list[int] = []
    saving.blocks[0].attention.register_forward_hook(lambda *_: calls.append(1))
    for student in (plain, saving):
        student(ids, mask, labels=ids, use_cache=student is saving).loss.backward()
    assert len(calls) == 2, "the block runs again in the backward pass"
    for expected, found in zip(plain.parameters(), saving.parameters(), strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("final_norm", ["layer_norm", "folded"])
def test_bf16_autocast_keeps_states_in_fp32_and_stays_close(kind: str, final_norm: str) -> None:
    student = noisy_student(kind, final_norm=final_norm).train()
    ids = tokens(2, 20)
    expected = student(ids).logits
    states: list[torch.Tensor] = []
    for block in student.blocks:
        block.register_forward_hook(lambda _, __, state: states.append(state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = student(ids, labels=ids)
        cached = student.eval()(ids, use_cache=True)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert {state.dtype for state in states} == {torch.float32}
    assert (output.logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert cached.logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_whole_models_in_another_dtype(kind: str, dtype: torch.dtype) -> None:
    student, ids = noisy_student(kind), tokens(2, 6)
    expected = student(ids).logits
    student.to(dtype)
    logits = student(ids, output_attentions=True).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    torch.testing.assert_close(student(ids).logits, logits, atol=0.1, rtol=0.1)
    assert student.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_untying_gives_the_head_its_own_weight(kind: str) -> None:
    student, ids = noisy_student(kind), tokens(1, 5)
    tied_size, expected = student.get_num_params(), student(ids).logits
    assert student.lm_head.weight is student.wte.weight
    assert untie_lm_head(BlockStack(student))
    assert torch.equal(student(ids).logits, expected)
    assert student.all_tied_weights_keys == student.get_expanded_tied_weights_keys() == {}
    assert student.get_num_params() == tied_size + student.wte.weight.numel()
    own = student.lm_head.weight
    assert not untie_lm_head(BlockStack(student))
    assert student.lm_head.weight is own, "a head that has learned is not overwritten"
    student.tie_weights()
    assert student.lm_head.weight is own, "HuggingFace re-ties whenever it likes"
    with torch.no_grad():
        own.zero_()
    assert student.wte.weight.abs().sum() > 0


@pytest.mark.parametrize("head", [{"head_rank": 5}, {"final_norm": "folded"}], ids=str)
def test_a_head_that_was_never_tied_is_left_alone(head: dict[str, Any]) -> None:
    student, ids = noisy_student("Vanilla", **head), tokens(1, 5)
    expected = student(ids).logits
    assert not untie_lm_head(BlockStack(student))
    student.tie_weights()
    assert torch.equal(student(ids).logits, expected)
    assert student.all_tied_weights_keys == {}


def test_the_product_of_a_low_rank_head_passes_gradients_to_both_factors() -> None:
    head = noisy_student("Vanilla", head_rank=5).lm_head
    assert head.bias is None
    features = torch.randn(7, 24)
    torch.testing.assert_close(features @ head.weight.T, head(features))
    target = torch.randn(7, VOCAB)
    direct = torch.autograd.grad((head(features) * target).sum(), [*head.parameters()])
    product = torch.autograd.grad(((features @ head.weight.T) * target).sum(), [*head.parameters()])
    for found, expected in zip(product, direct, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_students_of_one_configuration_do_not_share_it(kind: str) -> None:
    build = get_model_class(kind)
    config = build.config_class.from_fields(student_config(kind))
    before = config.to_dict()
    one, other = build(config), build(config)
    untie_lm_head(BlockStack(one))
    assert not one.config.tie_word_embeddings
    assert other.config.tie_word_embeddings
    assert config.to_dict() == before
    assert one.blocks[0].config is one.config, "a student's parts read its own"


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_that_stops_the_forward_leaves_the_model_clean(kind: str) -> None:
    student, ids = noisy_student(kind), tokens(1, 5)
    expected = student(ids).logits

    def stop(*_: Any) -> None:
        raise InterruptedError

    handle = student.blocks[1].register_forward_hook(stop)
    with pytest.raises(InterruptedError):
        student(ids)
    handle.remove()
    assert torch.equal(student(ids).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_map_a_state_to_a_state(kind: str) -> None:
    student = noisy_student(kind)
    seen: list[torch.Tensor] = []
    for block in student.blocks:
        block.register_forward_hook(lambda _, args, state: seen.extend((args[0], state)))
    student(tokens(2, 5))
    width = 48 if kind == "Factored" else 24
    assert all(state.shape == (2, 5, width) for state in seen)
    assert seen[1] is seen[2]
    assert student.read_hidden_states(seen[0]).shape == (2, 5, 24)
    assert isinstance(student, StudentModel)
