"""The registry of students: the one place that names them, and what follows it."""

import pytest
from transformers import AutoModelForCausalLM

import model
from config_distillation import MODEL_TYPES
from tests.reference_students import EQUATIONS, student_config


def test_the_commands_offer_the_registered_students() -> None:
    assert list(MODEL_TYPES) == sorted(model.STUDENTS)


def test_every_student_has_reference_equations() -> None:
    assert set(EQUATIONS) == set(model.STUDENTS)


def test_a_subclass_with_the_same_configuration_does_not_take_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vanilla = model.STUDENTS["Vanilla"]

    class Mine(vanilla):  # type: ignore[misc, valid-type]
        pass

    config = model.VanillaConfig.from_fields(student_config("Vanilla"))
    monkeypatch.setitem(model.STUDENTS, "Mine", Mine)
    try:
        model._register_with_transformers()
        assert type(AutoModelForCausalLM.from_config(config)) is vanilla
    finally:
        AutoModelForCausalLM.register(model.VanillaConfig, vanilla, exist_ok=True)
