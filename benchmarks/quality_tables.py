"""The trials that the study's settings were chosen by, and all of its tables by name.

Trials are judged on the validation split, with a seed that is not reported.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from benchmarks.quality_plan import (
    KINDS,
    REAL_KIND,
    REAL_SHAPES,
    TUNING_SEED,
    Run,
    arms,
    arms_table,
    efficiency_table,
    half_table,
    heads_table,
    inputs_table,
    polishes_table,
    real_arms,
    self_table,
    sizes_table,
    smollm2_table,
    stitches_table,
)
from benchmarks.quality_runs import Arm

TRIALS: Final = {
    "A0": [{"polish_lr": rate} for rate in (1e-3, 2e-3, 4e-3)],
    "A1": [{"polish_lr": rate} for rate in (1e-3, 2e-3, 4e-3)],
    "A3": [{"polish_lr": rate} for rate in (2e-3, 4e-3, 8e-3, 16e-3)],
    "A4": [
        {"lr_per_block": 1e-3, "polish_lr": 2e-3},
        {"lr_per_block": 2e-3, "polish_lr": 2e-3},
        {"lr_per_block": 6e-3, "polish_lr": 2e-3},
        {"lr_per_block": 2e-3, "polish_lr": 1e-3},
    ],
}
"""Learning rates that were tried for each arm."""
POLISH_TRIALS: Final[dict[str, list[tuple[float, float, bool]]]] = {
    "A5": [
        (0.15, 0.0, False),
        (0.15, 10.0, False),
        (0.15, 30.0, True),
        (0.08, 30.0, True),
        (0.05, 30.0, True),
        (0.02, 30.0, True),
    ],
    "A6": [
        (0.0, 1.0, False),
        (0.0, 10.0, False),
        (0.0, 30.0, False),
        (0.0, 10.0, True),
        (0.0, 30.0, True),
        (0.0, 100.0, True),
    ],
}
"""Share of the blocks, weight of the hidden states in the polish, and whether it fades."""


INPUT_TRIALS: Final[dict[str, dict[str, Any]]] = {
    "teacher inputs": {"inputs": "teacher"},
    "mixed inputs": {},
    "mixed inputs blocks 10%": {"blocks": 0.1},
    "mixed inputs blocks 15%": {"blocks": 0.15},
    "mixed inputs weight 10": {"weight": 10.0},
    "mixed inputs weight 100": {"weight": 100.0},
    "mixed inputs blocks rate 3e-3": {"lr_per_block": 3e-3},
    "mixed inputs blocks rate 12e-3": {"lr_per_block": 12e-3},
}
"""What else entered A5's blocks, for Vanilla: share of the blocks, weight of the hidden states."""
HEAD_RATES: Final = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Of a head phase of 20 %, for Vanilla; 1e-3 is within 0.004 nats of the best for either start."""


REAL_TRIALS: Final[list[tuple[str, float, float]]] = [
    ("A3", 5e-4, 0.0),
    ("A6", 5e-4, 0.0),
    ("A3", 1e-3, 0.0),
    ("A6", 1e-3, 0.0),
    ("A5", 1e-3, 5e-4),
    ("A1", 2e-3, 0.0),
    ("A1", 1e-3, 0.0),
]
"""For the real teacher's larger students: arm, rates of polish and of blocks."""


def real_trials() -> Iterator[Run]:
    """What was tried for students of the real teacher."""
    for name, polish, blocks in REAL_TRIALS:
        arm = real_arms("half")[name]
        rates = {"polish_lr": polish, "lr_per_block": blocks} if blocks else {"polish_lr": polish}
        shown = " ".join(f"{key} {value:g}" for key, value in rates.items())
        tried = replace(arm, name=f"{name} {shown}", training={**arm.training, **rates})
        shape = dict(REAL_SHAPES["half"])
        yield Run(tried, REAL_KIND, "half of real", TUNING_SEED, shape, "smollm2")


def more_trials() -> Iterator[Arm]:
    """What was tried for Vanilla alone."""
    a5 = arms()["A5"]
    for name, trial in INPUT_TRIALS.items():
        options = {
            "block_inputs": trial.get("inputs", "mixed"),
            "polish_hidden_weight": trial.get("weight", 30.0),
        }
        rate = {"lr_per_block": trial.get("lr_per_block", a5.training["lr_per_block"])}
        yield replace(
            a5,
            name=f"A5 {name}",
            blocks=trial.get("blocks", a5.blocks),
            options=a5.options | options,
            training=a5.training | rate,
        )
    for run in heads_table():
        name = run.arm.name
        if name in ("A5 fitted head 20%", "A5 random head 20%") and run.seed == 1:
            for head_rate in HEAD_RATES if run.kind == "Vanilla" else ():
                training = run.arm.training | {"lm_head_lr": head_rate}
                yield replace(run.arm, name=f"{name} lm_head_lr {head_rate:g}", training=training)


def rate_trials() -> Iterator[Run]:
    """What was tried for each kind's rates."""
    for kind in KINDS:
        for name, trials in TRIALS.items():
            for trial in trials:
                arm = arms(kind)[name]
                shown = " ".join(f"{key} {value:g}" for key, value in trial.items())
                tried = replace(arm, name=f"{name} {shown}", training=arm.training | trial)
                # The larger budget shows more of what diverges.
                for budget in ("small",) if name == "A4" else ("small", "middle"):
                    yield Run(tried, kind, budget, TUNING_SEED)


def tuning_table() -> Iterator[Run]:
    """The trials of learning rates, to be judged on the validation split."""
    yield from real_trials()
    for arm in more_trials():
        yield Run(arm, "Vanilla", "small", TUNING_SEED)
        if arm.name == "A5 mixed inputs":
            for tried in (arms()["A5"], arm):
                yield Run(tried, "Vanilla", "middle", TUNING_SEED)
    for kind in KINDS[1:]:
        a5 = arms(kind)["A5"]
        options = a5.options | {"block_inputs": "mixed"}
        mixed = replace(a5, name="A5 mixed inputs", options=options)
        yield Run(mixed, kind, "small", TUNING_SEED)
    yield from rate_trials()
    for kind in KINDS:
        for name, shapes in POLISH_TRIALS.items():
            for share, weight, fades in shapes:
                arm = arms(kind)[name]
                options = {"polish_hidden_weight": weight, "polish_hidden_fade": fades}
                shown = f"{name} blocks {share:.0%} weight {weight:g}{' fading' * fades}"
                tried = replace(arm, name=shown, blocks=share, options=arm.options | options)
                yield Run(tried, kind, "small", TUNING_SEED)


TABLES: Final[dict[str, Callable[[], Iterator[Run]]]] = {
    "arms": arms_table,
    "polishes": polishes_table,
    "efficiency": efficiency_table,
    "stitches": stitches_table,
    "heads": heads_table,
    "inputs": inputs_table,
    "half": half_table,
    "sizes": sizes_table,
    "self": self_table,
    "smollm2": smollm2_table,
    "tuning": tuning_table,
}
