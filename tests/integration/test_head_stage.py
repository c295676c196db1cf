"""The head phase's chunked loss against the dense one, through the models' own heads."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import LLAMA_LIKE, batches, padded, tiny_student, tiny_teacher

HEADS: dict[str, dict[str, Any]] = {
    "Vanilla": {},
    "Factored": {},
    "SASP": {"head_rank": 5},
    "folded": {"model_type": "Vanilla", "final_norm": "folded"},
    "both": {"model_type": "SASP", "final_norm": "folded", "head_rank": 5},
}
CAPPED = {"final_logit_softcapping": 2.0, "head_dim": 8, "sliding_window": 8}


def teacher_of(family: str) -> Any:
    if family == "gemma2":
        return tiny_teacher("gemma2", config_fields={**LLAMA_LIKE, **CAPPED})
    if family == "cohere":
        return tiny_teacher("cohere", config_fields={**LLAMA_LIKE, "logit_scale": 0.25})
    return tiny_teacher(family)


def stage_of(teacher: Any, student: Any) -> Any:
    from cleangpt.blocks import BlockStack
    from distillation.activations import Activations
    from distillation.head_init import untie_lm_head
    from distillation.logit_stages import HeadStage
    from distillation.losses import LogitDistillationLoss

    stack = BlockStack(student)
    untie_lm_head(stack)
    activations = Activations(BlockStack(teacher), stack, 2**30)
    return HeadStage(activations, LogitDistillationLoss("kl_div", 2.0), loss_weight=0.5)


def gradients(stage: Any) -> dict[str, Tensor]:
    found = stage.trainable_parameters()
    return {name: p.grad.clone() for name, p in found.items() if p.grad is not None}


@pytest.mark.parametrize("student_family", [*HEADS, "gemma2"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere"])
def test_chunked_equals_dense(
    family: str, student_family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillation.batch import as_batch
    from distillation.losses import LogitDistillationLoss, chunked

    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", 1)  # chunks of 64 positions
    teacher = teacher_of(family)
    if student_family in HEADS:
        fields = HEADS[student_family]
        student = tiny_student(fields.get("model_type", student_family), **fields)
    else:
        student = teacher_of(student_family)
    student.eval()
    stage = stage_of(teacher, student)
    (raw,) = batches(1, batch_size=9)
    batch = as_batch(padded(raw, 3), torch.device("cpu"))

    student.zero_grad()
    loss = stage.loss(batch)
    loss.backward()
    ours_gradients = gradients(stage)

    student.zero_grad()
    mask = batch.attention_mask.long()
    with torch.no_grad():
        expected_teacher = stage.teacher.logits(batch.input_ids, mask)
    logits = stage.student.logits(batch.input_ids, mask)
    dense = 0.5 * LogitDistillationLoss("kl_div", 2.0)(
        batch.valid(logits), batch.valid(expected_teacher)
    )
    dense.backward()
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5)
    expected = gradients(stage)
    assert ours_gradients.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        close = {"rtol": 1e-5, "atol": 1e-5 * float(gradient.abs().max())}
        torch.testing.assert_close(ours_gradients[name], gradient, **close)


@pytest.mark.parametrize(
    ("family", "linear"), [("gpt2", True), ("gemma2", False), ("cohere", False)]
)
def test_caps_and_scales_are_seen(family: str, linear: bool) -> None:
    from cleangpt.blocks import BlockStack
    from cleangpt.heads import head_is_linear

    assert head_is_linear(BlockStack(teacher_of(family))) is linear


def test_a_head_in_two_factors_is_linear_until_something_follows_it() -> None:
    from cleangpt.blocks import BlockStack
    from cleangpt.heads import head_factors, head_is_linear
    from model import VanillaTransformerModelDistillation

    class Capped(VanillaTransformerModelDistillation):
        """Its cap is so wide that it moves logits by less than a hundred-thousandth."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 100.0 * torch.tanh(output.logits / 100.0)
            return output

    student = tiny_student("Vanilla", head_rank=5)
    assert head_factors(student.lm_head) == (student.lm_head.down, student.lm_head.up)
    assert head_is_linear(BlockStack(student))
    capped = Capped(student.config)
    capped.load_state_dict(student.state_dict())
    assert not head_is_linear(BlockStack(capped))
    full = tiny_student("Vanilla")
    assert head_factors(full.lm_head) is None
