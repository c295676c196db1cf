"""Settings that go together: the tutorial's algorithm, and the best one we know.

A recipe is nothing but values for the arguments of :class:`~distillation.DistillationTrainer` and
of its ``train``; whatever is passed explicitly wins over it.
"""

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Recipe:
    """One way to distil.

    Args:
        name: What it is called.
        options: Keyword arguments of ``DistillationTrainer``.
        training: Keyword arguments of ``DistillationTrainer.train``.

    Example:
        >>> recipe = RECIPES["best"]
        >>> recipe.training["polish_epochs"] > 0
        True
    """

    name: str
    options: dict[str, Any]
    training: dict[str, Any]


TUTORIAL: Final = Recipe(
    "tutorial",
    {
        "distill_loss_type": "mse",
        "logit_loss_type": "kl_div",
        "logit_loss_temperature": 2.0,
        "init_from_teacher": "none",
        "stitch_start": "random",
        "early_stop_patience": 0,
        "overfit_gate": False,
    },
    {
        "epochs_per_block": 3,
        "lr_per_block": 1e-3,
        "train_lm_head": True,
        "lm_head_epochs": 3,
        "lm_head_lr": 1e-4,
        "initialize_head_from_teacher": True,
        "polish_epochs": 0,
    },
)
BEST: Final = Recipe(
    "best",
    {
        "distill_loss_type": "nmse",
        "logit_loss_type": "kl_div",
        "logit_loss_temperature": 1.0,
        "init_from_teacher": "pca",
        "stitch_start": "least_squares",
        "polish_hidden_weight": 30.0,
        "polish_hidden_fade": True,
        "early_stop_patience": 2,
        "overfit_gate": True,
    },
    {
        "epochs_per_block": 1,
        "lr_per_block": 1e-3,
        "train_lm_head": True,
        "lm_head_epochs": 0,
        "lm_head_lr": 1e-3,
        "initialize_head_from_teacher": True,
        "polish_epochs": 3,
        "polish_lr": 1e-3,
    },
)
RECIPES: Final = {recipe.name: recipe for recipe in (TUTORIAL, BEST)}
