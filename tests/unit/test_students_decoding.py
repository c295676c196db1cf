"""Cache, padding, positions and ``generate`` agree with the plain forward pass."""

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from model import StudentModel, VanillaTransformerModelDistillation
from model.model_SASPV_distillation import RunningSumLayer
from tests.reference_students import KINDS, noisy_student, student_config, tokens

TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


def decode(student: StudentModel, ids: Tensor, cuts: list[int], **kwargs: Any) -> Tensor:
    """Return the logits of all positions, computed chunk by chunk through one cache."""
    mask = kwargs.pop("attention_mask", None)
    cache: Cache | None = kwargs.pop("past_key_values", None)
    logits = []
    for start, stop in pairwise([0, *cuts, ids.shape[1]]):
        seen = None if mask is None else mask[:, :stop]
        output = student(
            ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True, **kwargs
        )
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [list(range(1, 14)), [5, 6, 11], [13], [4]], ids=str)
def test_cached_decoding_equals_the_full_pass(kind: str, cuts: list[int]) -> None:
    student, ids = noisy_student(kind), tokens(3, 14)
    full = student(ids).logits
    torch.testing.assert_close(decode(student, ids, cuts), full, **TOLERANCE)
    torch.testing.assert_close(
        decode(student, ids, cuts, past_key_values=DynamicCache()), full, **TOLERANCE
    )


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_of_a_left_padded_batch(kind: str) -> None:
    student, ids = noisy_student(kind), tokens(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    full = student(ids, attention_mask=mask).logits
    chunked = decode(student, ids, [6, 7, 8], attention_mask=mask)
    for row, skip in enumerate((4, 1, 0)):
        torch.testing.assert_close(chunked[row, skip:], full[row, skip:], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_padded_prompt_can_be_continued(kind: str) -> None:
    student, ids = noisy_student(kind), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 3:6] = 0  # three tokens, three of padding, three more tokens
    chunked = decode(student, ids, [6], attention_mask=mask)
    alone = student(ids[:1, [0, 1, 2, 6, 7, 8]]).logits
    torch.testing.assert_close(chunked[:1, [0, 1, 2, 6, 7, 8]], alone, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_equals_none_and_a_batch_equals_its_rows(kind: str) -> None:
    student = noisy_student(kind)
    rows = [tokens(1, length, seed=length) for length in (4, 7, 9)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 9 - row.shape[1] :], mask[i, 9 - row.shape[1] :] = row[0], 1
    batch = student(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        expected = student(row).logits[0]
        torch.testing.assert_close(batch[i, 9 - row.shape[1] :], expected, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_right_padding_does_not_change_the_tokens_before_it(kind: str) -> None:
    student, ids = noisy_student(kind), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    other = ids.clone()
    other[0, 5:] = 7
    first, second = (student(each, attention_mask=mask).logits for each in (ids, other))
    assert torch.equal(first[0, :5], second[0, :5])
    torch.testing.assert_close(first[0, :5], student(ids[:1, :5]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "all"])
def test_padding_never_gives_nan(kind: str, side: str) -> None:
    student, ids = noisy_student(kind).train(), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 5), "right": slice(1, 6), "all": slice(0, 6)}[side]] = 0
    for eager in (False, True):
        student.zero_grad()
        output = student(ids, attention_mask=mask, output_attentions=eager)
        output.logits.square().mean().backward()
        assert output.logits.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_position_ids_and_embeddings_can_be_given(kind: str) -> None:
    student, ids = noisy_student(kind), tokens(2, 6)
    full = student(ids).logits
    positions = torch.arange(6).expand(2, 6)
    assert torch.equal(student(ids, position_ids=positions).logits, full)
    assert not torch.allclose(student(ids, position_ids=positions + 3).logits, full)
    assert torch.equal(student(inputs_embeds=student.wte(ids)).logits, full)
    assert torch.equal(student(ids, logits_to_keep=2).logits, full[:, -2:])
    assert isinstance(student(ids, return_dict=False), tuple)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        student()


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_forward_fills_no_cache(kind: str) -> None:
    student, ids = noisy_student(kind), tokens(1, 4)
    assert student(ids).past_key_values is None
    cache = student(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 4
    assert student(ids, use_cache=False, past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 8, "a cache that is given is used"


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_has_the_name_of_any_transformers(kind: str) -> None:
    """``past_key_values`` up to 5.23, ``cache`` since; a student is loaded by either."""
    student, ids = noisy_student(kind), tokens(1, 6)
    results = []
    for name in ("past_key_values", "cache"):
        earlier = student(ids[:, :4], use_cache=True).past_key_values
        results.append(student(ids[:, 4:], **{name: earlier}).logits)
        assert earlier.get_seq_length() == 6
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="two names of one argument"):
        student(ids, past_key_values=earlier, cache=earlier)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_do_not_fit_are_refused(kind: str) -> None:
    student = noisy_student(kind)
    with pytest.raises(ValueError, match=r"has 25 tokens, but .* block_size=24\.\nShorten"):
        student(tokens(1, 25))
    with pytest.raises(ValueError, match=r"shape \(1, 3\), but .* 0 cached \+ 4 new"):
        student(tokens(1, 4), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="other masks are not supported"):
        student.generate(tokens(1, 4), max_new_tokens=3, cache_implementation="static")
    # Padding takes no position: 24 tokens after 2 of padding still fit.
    mask = torch.ones(1, 26, dtype=torch.long)
    mask[0, :2] = 0
    assert student(tokens(1, 26), attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_the_argmax_of_the_full_pass(kind: str) -> None:
    student, ids = noisy_student(kind), tokens(2, 5)
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            best = student(expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, best), dim=1)
    for use_cache in (True, False):
        found = student.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use_cache)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_of_a_left_padded_batch_equals_its_rows(kind: str) -> None:
    student = noisy_student(kind, padding_idx=0)
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batch = student.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    single = student.generate(ids[:1, 3:], max_new_tokens=6, do_sample=False)
    assert torch.equal(batch[0, 6:], single[0, 3:])


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_and_sampling_do_not_depend_on_the_cache(kind: str) -> None:
    student, ids = noisy_student(kind, padding_idx=0), tokens(2, 4)
    for settings in (
        {"num_beams": 4, "do_sample": False, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8, "top_k": 10},
        {"num_beams": 2, "do_sample": True},
    ):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            found.append(student.generate(ids, max_new_tokens=8, use_cache=use_cache, **settings))
        assert torch.equal(*found), settings


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_lookup_decoding_crops_the_cache(kind: str) -> None:
    student = noisy_student(kind)
    ids = tokens(1, 3).repeat(1, 3)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 40}
    plain = student.generate(ids, **settings)
    looked_up = student.generate(ids, prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(plain, looked_up)


def test_generation_stops_at_the_context_by_default(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = noisy_student("SASP", output_hidden_states=True)
    assert student.generate(tokens(1, 4)).shape == (1, 24)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert student.generate(tokens(1, 4), max_new_tokens=3).shape == (1, 7)
    settings = GenerationConfig(max_new_tokens=3)
    assert student.generate(tokens(1, 4), generation_config=settings).shape == (1, 7)
    assert student.generate(tokens(1, 4), settings).shape == (1, 7)
    assert not caplog.records


def test_the_sum_of_the_running_mean_follows_the_values() -> None:
    layer = RunningSumLayer()
    keys, values = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    layer.update(keys[:, :, :3], values[:, :, :3])
    layer.update(keys[:, :, 3:], values[:, :, 3:])
    steps: list[tuple[str, Any]] = [
        ("batch_repeat_interleave", 2),
        ("reorder_cache", torch.tensor([3, 0, 0, 1])),
        ("batch_select_indices", torch.tensor([2, 0])),
        ("crop", -2),
    ]
    for name, argument in steps:
        getattr(layer, name)(argument)
        assert layer.value_sum is not None
        torch.testing.assert_close(layer.value_sum, layer.values.sum(-2))
    layer.reset()
    assert layer.value_sum is None
    assert layer.values is None or not layer.values.any()


def test_sasp_replaces_only_empty_plain_caches() -> None:
    student, ids = noisy_student("SASP"), tokens(1, 6)
    cache = student(ids, use_cache=True).past_key_values
    assert all(isinstance(layer, RunningSumLayer) for layer in cache.layers)

    class OtherLayer(DynamicLayer):
        """A foreign kind of layer: the mean is then read from its values."""

    foreign = DynamicCache()
    foreign.layers = [OtherLayer() for _ in range(3)]
    found = decode(student, ids, [2, 3], past_key_values=foreign)
    torch.testing.assert_close(found, student(ids).logits, **TOLERANCE)
    assert all(type(layer) is OtherLayer for layer in foreign.layers)


class FourArguments(VanillaTransformerModelDistillation):
    """The subclass of the tutorial."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> Any:
        output_hidden_states = True if output_hidden_states is None else output_hidden_states
        return super().forward(input_ids, attention_mask, labels, output_hidden_states)

    def get_num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())


def test_the_tutorial_subclass_runs_and_generates() -> None:
    torch.manual_seed(0)
    student = FourArguments(config=student_config("Vanilla", padding_idx=0)).eval()
    plain = VanillaTransformerModelDistillation(student_config("Vanilla", padding_idx=0)).eval()
    plain.load_state_dict(student.state_dict())
    ids = tokens(2, 5)
    output = student(ids, labels=ids)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.logits, plain(ids).logits)
    assert student.get_num_params() == plain.get_num_params()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for settings in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        for attention_mask in (None, mask):
            found, expected = (
                each.generate(ids, attention_mask=attention_mask, max_new_tokens=6, **settings)
                for each in (student, plain)
            )
            assert torch.equal(found, expected)
