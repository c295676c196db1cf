"""How the API pages read our docstrings: what Google's style leaves to the reader, made plain."""

import re
from typing import Any

import griffe

OURS = ("distillation", "model", "cleangpt", "config_distillation", "stitching_layers")
ROLE = re.compile(r":(?:class|meth|func|attr|mod):`~?([\w.]+)`")


class OurDocstrings(griffe.Extension):
    """Takes ``Example:`` for examples, and ``:class:`` with a full path for a link."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring before it is parsed."""
        if obj.docstring:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = ROLE.sub(linked, text)


def linked(role: re.Match[str]) -> str:
    """A role as a link if its path is a full one, and as code otherwise."""
    path = role[1]
    short = path.rpartition(".")[2]
    is_full = path.partition(".")[0] in OURS
    return f"[`{short}`][{path}]" if is_full else f"`{path}`"
