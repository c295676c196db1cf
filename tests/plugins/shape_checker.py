"""The run-time checker that jaxtyping puts around every function of ours while tests run.

It is beartype. On Python 3.10 ``typing.Unpack`` comes from a backport that beartype cannot read, so
there a function with such a hint goes unchecked; every newer version checks it.
"""

import sys
from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep484TypeVarException


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    if sys.version_info >= (3, 11):
        return beartype(function)
    try:
        return beartype(function)
    except BeartypeDecorHintPep484TypeVarException:
        return function
