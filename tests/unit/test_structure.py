"""What is refused of a model's structure, and what is another fault."""

import pytest

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError
from distillation.preflight import check_structure
from tests.builders import tiny_teacher


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (MemoryError("no room"), MemoryError),
        (InputError("a file is gone", "Put it back."), InputError),
        (RuntimeError("what another block left"), InputError),
    ],
)
def test_only_a_block_that_cannot_run_alone_is_refused_for_its_structure(
    fault: Exception, told: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def advance(*_: object, **__: object) -> None:
        raise fault

    stack = BlockStack(tiny_teacher())
    check_structure(stack)
    monkeypatch.setattr(BlockStack, "advance", advance)
    with pytest.raises(told) as caught:
        check_structure(stack)
    assert (caught.value is fault) == (not isinstance(fault, RuntimeError))
