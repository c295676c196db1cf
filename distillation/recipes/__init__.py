"""Settings that go together: the tutorial's algorithm, and the best one we know.

A recipe is a file of settings, by the names of the flags; whatever is given explicitly wins over
it. The two that come with the library are ``tutorial.yaml`` and ``best.yaml`` beside this file; the
command takes a file of one's own in their place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

OF_TRAIN: Final = frozenset(
    {
        "epochs_per_block",
        "lr_per_block",
        "train_lm_head",
        "lm_head_epochs",
        "lm_head_lr",
        "initialize_head_from_teacher",
        "polish_epochs",
        "polish_lr",
    }
)
"""What in our recipes is an argument of ``train``."""
OF_THE_COMMAND: Final = frozenset({"validation_tokens"})
"""What the command turns into held-out text."""


@dataclass(frozen=True)
class Recipe:
    """One way to distil.

    Args:
        name: What it is called.
        settings: All of it, by the names of the flags.
        of_kinds: What is otherwise for a kind of student, by its name.

    Example:
        >>> recipe = RECIPES["best"]
        >>> recipe.training["polish_epochs"] > 0
        True
    """

    name: str
    settings: Mapping[str, Any]
    of_kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings_for(self, kind: str) -> dict[str, Any]:
        """The settings for one kind of student."""
        return {**self.settings, **self.of_kinds.get(kind, {})}

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of :class:`~distillation.DistillationTrainer`."""
        others = OF_TRAIN | OF_THE_COMMAND
        return {name: value for name, value in self.settings.items() if name not in others}

    @property
    def training(self) -> dict[str, Any]:
        """The keyword arguments of its ``train``."""
        return {name: value for name, value in self.settings.items() if name in OF_TRAIN}


def _ours(name: str) -> Recipe:
    text = Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    return Recipe(name, settings, settings.pop("of_kinds", {}))


RECIPES: Final = {name: _ours(name) for name in ("tutorial", "best")}
