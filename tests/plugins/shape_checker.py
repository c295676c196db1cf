"""The run-time checker that jaxtyping puts around every function of ours while tests run.

It is beartype. On Python 3.10 ``typing.Unpack`` comes from a backport that beartype cannot read, so
there a function with such a hint goes unchecked; every newer version checks it.

A function inside another is defined anew at each call of that one, often once a block and batch.
beartype takes a millisecond for each, so the first of each place is checked and the later ones not.
"""

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep484TypeVarException

_seen: set[CodeType] = set()


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    code = getattr(function, "__code__", None)
    if code is not None and "<locals>" in function.__qualname__:
        if code in _seen:
            return function
        _seen.add(code)
    if sys.version_info >= (3, 11):
        return beartype(function)
    try:
        return beartype(function)
    except BeartypeDecorHintPep484TypeVarException:
        return function
