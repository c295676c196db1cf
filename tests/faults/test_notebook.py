"""In a notebook an interrupt or an error leaves both models usable, and the run can go on."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import batches, tiny_student, tiny_teacher
from tests.faults.small_runs import STEPS, TRAINING, equal_weights, small_trainer


def state(model: Any) -> list[Any]:
    """Modes, whose hooks are there, and which parameters ask for a gradient."""
    modules: list[Any] = [
        (name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return [*modules, *((name, p.requires_grad) for name, p in model.named_parameters())]


def raising(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, id="block 0", marks=pytest.mark.slow),
        pytest.param(7, id="block 1"),
        pytest.param(10, id="head", marks=pytest.mark.slow),
        pytest.param(15, id="polish", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_in_a_step_leaves_both_models_usable_and_the_run_goes_on(
    step: int, tmp_path: Path
) -> None:
    assert step < STEPS
    error: BaseException = KeyboardInterrupt() if step % 2 else ValueError("a bug")
    teacher, student = tiny_teacher().train(), tiny_student()
    student.wpe.weight.requires_grad_(False)
    before = [state(model) for model in (teacher, student)]
    options: dict[str, Any] = {"teacher": teacher, "student": student, "checkpoint_steps": 3}
    own = small_trainer(tmp_path, raising(error), step, **options)
    with pytest.raises(type(error)):
        own.train(**TRAINING)
    after = [state(model) for model in (teacher, student)]
    if step > 8:  # the head has a weight of its own from its phase on
        assert after[1].pop() == ("lm_head.weight", True)
    assert after == before
    assert torch.is_grad_enabled()
    ids = batches(1)[0]["input_ids"]
    for model in (teacher, student):
        assert not any(p.grad is not None for p in model.parameters())
        model(ids).logits.sum().backward()
        model.zero_grad(set_to_none=True)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    # The same trainer, in the next cell; what raised does not come again.
    assert own.train(**TRAINING)["polish"]["steps"] == 4
    assert equal_weights(teacher, tiny_teacher())


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 10, 15], ids=["block 1", "head", "polish"])
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(
    step: int, tmp_path: Path
) -> None:
    """At step 10 the head is untied already, and in the last checkpoint it is tied."""
    training = {**TRAINING, "initialize_head_from_teacher": False}
    straight = small_trainer(tmp_path / "straight")
    straight.train(**training)
    error = KeyboardInterrupt()
    own = small_trainer(tmp_path / "other", raising(error), step, checkpoint_steps=7)
    with pytest.raises(KeyboardInterrupt):
        own.train(**training)
    own.train(**training)
    assert equal_weights(own.student_model, straight.student_model)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 3, 5, 7], ids="before {0}".format)
def test_an_interrupt_inside_a_models_forward_leaves_no_hook(call: int, tmp_path: Path) -> None:
    """While the teacher is looked at, before anything is ready, and while it teaches."""
    teacher, student = tiny_teacher(), tiny_student()
    calls = [0]

    def interrupt(module: Any, inputs: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt

    own = small_trainer(tmp_path, teacher=teacher, student=student)
    handle = teacher.transformer.h[1].register_forward_pre_hook(interrupt)
    before = [state(model) for model in (teacher, student)]
    with pytest.raises(KeyboardInterrupt):
        own.train(**TRAINING)
    assert calls[0] == call
    assert [state(model) for model in (teacher, student)] == before
    handle.remove()
    assert own.train(**TRAINING)["polish"]["steps"] == 4


@pytest.mark.slow
def test_a_trainer_works_in_a_thread_where_signals_cannot_be_handled(tmp_path: Path) -> None:
    results: list[Any] = []
    own = small_trainer(tmp_path)
    thread = threading.Thread(target=lambda: results.append(own.train(**TRAINING)))
    thread.start()
    thread.join()
    assert results[0]["polish"]["steps"] == 4
