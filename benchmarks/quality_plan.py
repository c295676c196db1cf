"""The plan of the quality study: which arms, students, budgets and seeds, and what decides.

Committed before the runs. The primary endpoint is the test loss in nats per token; differences are
paired by seed. A seed decides the student's start, the order of the data and everything else that
is random; the teacher is the built-in one. Eight seeds for the arms of the three primary contrasts
(A5 - A3, A4 - A1, A5 - A6), five for the others.

A5 and A6 are not those of the plan's first form: that A5 gave 15 % of the budget to the blocks and
then learnt logits alone, that A6 weighed hidden states by a constant 1. Their runs at the small
budget are the table ``polishes`` now. Trials on the validation split (``POLISH_TRIALS`` of
``quality_tables``) then found that hidden states in the polish want a weight of about 30 that fades
to nothing, and the blocks a twentieth of the budget, for all kinds of students. Teacher's and mixed
inputs of the blocks (``INPUT_TRIALS``) gained Vanilla 0.01 nats there and nothing at the middle
budget, and cost SASP 0.2.

What was mended after runs, which were then taken out and made again: a head phase's share counted
its own steps and not the states that it is the first to read, so that 20 % of what the blocks leave
was nearly all of it; arms without a polish (A7, T) did not count them either; the variants of
stitches had a polish without hidden states; the student that is its teacher had no held-out text.

Learning rates were chosen on the validation split with seed 0, which is not reported: from
``TRIALS`` at the small budget, but for A4's last one, which only Vanilla had. A0's and A1's were
chosen again at the middle budget, for it and the large one: SASP's A0 had come apart at the 4e-3
that all its students from random weights were given, and ended 1.1 nats worse than at 2e-3. Its
runs, Vanilla's A0 at the small budget, and SASP's A1 and Factored's A0 at the middle one were taken
out; all but SASP's single A1 were made again at once. The others take their relatives' rates;
blocks of inherited students were tried at 2, 3, 6 and 12 e-3.

The way from training from scratch to the teacher is asked of students with half of the teacher's
parameters. It was measured on the main table's at first, which have 31 to 34 % of them; the table
``half`` came later.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from benchmarks.quality_runs import Arm

BUDGETS: Final = {"small": 1e12, "middle": 3e12, "large": 9e12}
"""Training operations, the teacher's forward passes counted."""
SHORTENED: Final = {"two thirds of middle": 2e12, "two thirds of large": 6e12}
"""What the default recipe is to reach the baseline's loss with."""
PRIMARY_SEEDS, OTHER_SEEDS = range(1, 9), range(1, 6)
TUNING_SEED = 0
SEQ_LEN = 128

SHAPE: Final = {"block_size": SEQ_LEN, "vocab_size": 2048, "n_layer": 6, "n_head": 6, "n_embd": 96}
KINDS: Final = ("Vanilla", "Factored", "SASP")
REAL_KIND: Final = "Llama"
"""Students of the real teacher are of its own architecture."""

NMSE: Final = {"distill_loss_type": "nmse", "stitch_start": "least_squares"}
TOGETHER: Final = {**NMSE, "polish_hidden_weight": 30.0, "polish_hidden_fade": True}
"""A polish that begins with hidden states and ends with logits."""


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of one kind of student.

    Args:
        scratch: Of a student from random weights that learns the text itself; at the small budget,
            and at the larger ones.
        random: Of one that learns logits, likewise.
        inherited: Of the whole student from inherited ones.
        polish: Of an inherited student after its blocks.
        random_blocks: Of blocks from random weights.
        random_polish: Of the whole student after those.
        inherited_blocks: Of blocks from inherited weights.
    """

    scratch: tuple[float, float]
    random: tuple[float, float]
    inherited: float
    polish: float
    random_blocks: float
    random_polish: float
    inherited_blocks: float = 6e-3


RATES: Final = {
    "Vanilla": Rates((1e-3, 2e-3), (2e-3, 2e-3), 4e-3, 2e-3, 2e-3, 1e-3),
    "Factored": Rates((4e-3, 2e-3), (4e-3, 4e-3), 8e-3, 4e-3, 6e-3, 2e-3),
    "SASP": Rates((2e-3, 2e-3), (4e-3, 2e-3), 8e-3, 4e-3, 6e-3, 2e-3),
    REAL_KIND: Rates((1e-3, 1e-3), (1e-3, 1e-3), 1e-3, 1e-3, 1e-3, 5e-4, 5e-4),
}


def arms(kind: str = "Vanilla", budget: str = "small") -> dict[str, Arm]:
    """The arms of the main table, by name, for one kind of student at one budget."""
    rates = RATES[kind]
    longer = int(budget != "small")
    inherited: dict[str, Any] = {"init": "pca", "head_phase": True}
    blocks = {"polish_lr": rates.inherited, "lr_per_block": rates.inherited_blocks}
    recipe = {**TOGETHER, "stitch_equal_widths": kind == "SASP"}
    best = Arm(name="A5", **inherited, blocks=0.05, options=recipe, training=blocks)
    found = [
        Arm(name="A0", next_token=True, training={"polish_lr": rates.scratch[longer]}),
        Arm(name="A1", training={"polish_lr": rates.random[longer]}),
        Arm(name="A2", **inherited, next_token=True, training={"polish_lr": rates.inherited}),
        Arm(name="A3", **inherited, training={"polish_lr": rates.inherited}),
        Arm(
            name="A4",
            blocks=0.25,
            head_phase=True,
            options=NMSE,
            training={"polish_lr": rates.random_polish, "lr_per_block": rates.random_blocks},
        ),
        best,
        replace(best, name="A6", blocks=0.0),
        replace(best, name="A7", blocks=1.0),
        replace(best, name="A8", untrained_start=True),
        Arm(
            name="T",
            blocks=0.75,
            blocks_at_most=0.75,
            head=1.0,
            head_phase=True,
            options={"logit_loss_temperature": 2.0},
            training={"lr_per_block": 1e-3, "lm_head_lr": 1e-4},
        ),
    ]
    return {arm.name: arm for arm in found}


@dataclass(frozen=True)
class Run:
    """One line of a table.

    Args:
        arm: How the budget is spent.
        kind: Kind of student.
        budget: Name of the budget.
        seed: Of everything random.
        shape: The student's shape.
        teacher: The teacher's name for ``load_teacher``.
    """

    arm: Arm
    kind: str
    budget: str
    seed: int
    shape: dict[str, Any] = field(default_factory=lambda: dict(SHAPE))
    teacher: str = "builtin"

    @property
    def key(self) -> str:
        """What tells runs of a table apart."""
        size = f"{self.shape['n_layer']}x{self.shape.get('n_embd', 'teacher')}"
        return f"{self.arm.name}/{self.kind}/{size}/{self.budget}/seed {self.seed}"


def arms_table() -> Iterator[Run]:
    """Arms A0 to A8, and the tutorial's recipe, at three budgets."""
    for seed in PRIMARY_SEEDS:
        for kind in KINDS:
            for budget in BUDGETS:
                for name, arm in arms(kind, budget).items():
                    primary = name in ("A1", "A3", "A4", "A5", "A6")
                    if seed in OTHER_SEEDS or primary:
                        yield Run(arm, kind, budget, seed)


def polishes_table() -> Iterator[Run]:
    """Other polishes, at the smallest budget: by logits alone, by both with a constant weight."""
    for seed in OTHER_SEEDS:
        for kind in KINDS:
            best, rates = arms(kind)["A5"], RATES[kind]
            alone = {**best.training, "polish_lr": rates.polish}
            constant = {"polish_hidden_weight": 1.0, "polish_hidden_fade": False}
            for arm in (
                replace(best, name="A5 logits alone", blocks=0.15, options=NMSE, training=alone),
                replace(best, name="A6 weight 1", blocks=0.0, options={**NMSE, **constant}),
            ):
                yield Run(arm, kind, "small", seed)


def efficiency_table() -> Iterator[Run]:
    """A5 with two thirds of what A3 has in the main table."""
    for seed in OTHER_SEEDS:
        for kind in KINDS:
            for budget in SHORTENED:
                yield Run(arms(kind)["A5"], kind, budget, seed)


STITCH_VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "random, trained": {"stitch_start": "random"},
    "random, fixed": {"stitch_start": "random", "train_stitches": False},
    "fitted, fixed": {"train_stitches": False},
}
WIDTHS: Final = (48, 144)
UNSTITCHED: Final = {**SHAPE, "n_layer": 1, "n_embd": 192}
"""The student of the teacher's width with the nearest number of parameters: 1.26M, not 1.07M."""
AS_WIDE: Final = {**SHAPE, "n_layer": 3, "n_embd": 192}
"""The teacher's width and half of its depth."""


def stitches_table() -> Iterator[Run]:
    """A5 through other stitches, A5 and A3 over the width, and students that need no stitch."""
    for seed in OTHER_SEEDS:
        for kind in KINDS:
            known = arms(kind)
            for name, options in STITCH_VARIANTS.items():
                arm = replace(known["A5"], name=f"A5 {name}", options={**TOGETHER, **options})
                yield Run(arm, kind, "small", seed)
            for width in WIDTHS:
                for name in ("A3", "A5"):
                    arm = replace(known[name], name=f"{name} {width} wide")
                    yield Run(arm, kind, "small", seed, {**SHAPE, "n_embd": width})
            for name in ("A3", "A5"):
                options = {**known[name].options, "use_stitching_layers": False}
                arm = replace(known[name], name=f"{name} unstitched", options=options)
                yield Run(arm, kind, "small", seed, dict(UNSTITCHED))
            for name, stitched in (("A5 as wide", True), ("A5 as wide unstitched", False)):
                options = {**known["A5"].options, "stitch_equal_widths": stitched}
                arm = replace(known["A5"], name=name, options=options)
                yield Run(arm, kind, "small", seed, dict(AS_WIDE))


HEAD_SHARES: Final = (0.05, 0.2, 0.5, 1.0)
"""Of what the blocks leave, the states that the phase is the first to read included."""
HEAD_VARIANTS: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "fitted": ({}, {}),
    "random": ({}, {"initialize_head_from_teacher": False}),
    "tied": ({"head_tying": "tie"}, {}),
    "mse": ({"logit_loss_type": "mse"}, {}),
    "ce": ({"logit_loss_type": "ce"}, {}),
}
"""Options of the trainer and of ``train``, against A5's: KL, untied, fitted."""


def heads_table() -> Iterator[Run]:
    """A5 with a head phase of its own: by its share, start, tying and loss."""
    for seed in OTHER_SEEDS:
        for kind in KINDS:
            a5 = arms(kind)["A5"]
            for name, (options, training) in HEAD_VARIANTS.items():
                shares = HEAD_SHARES if name in ("fitted", "random") else (0.2,)
                for share in shares if name == "fitted" else (0.0, *shares):
                    yield Run(
                        replace(
                            a5,
                            name=f"A5 {name} head {share:.0%}",
                            head=share,
                            options={**a5.options, **options},
                            training={**a5.training, "lm_head_lr": 1e-3, **training},
                        ),
                        kind,
                        "small",
                        seed,
                    )


def inputs_table() -> Iterator[Run]:
    """A4 and A5 with the teacher's states as inputs of the blocks, or going over to the student's.

    The teacher's states are charged once, as for the student's inputs: where they enter is free.
    """
    for seed in OTHER_SEEDS:
        for kind in KINDS:
            for inputs in ("teacher", "mixed"):
                for name in ("A4", "A5"):
                    arm = arms(kind)[name]
                    options = {**arm.options, "block_inputs": inputs}
                    yield Run(
                        replace(arm, name=f"{name} {inputs} inputs", options=options),
                        kind,
                        "small",
                        seed,
                    )


HALF: Final = {"Vanilla": 120, "Factored": 126, "SASP": 126}
"""Widths of students with 48 to 50 % of the teacher's parameters, their own head included."""


def half_table() -> Iterator[Run]:
    """How far a student of half the teacher's size gets from training from scratch to the teacher.

    With the rates of the main table's students, which are a little narrower.
    """
    for seed in OTHER_SEEDS:
        for kind, width in HALF.items():
            for name in ("A0", "A5"):
                shape = {**SHAPE, "n_embd": width}
                yield Run(arms(kind, "middle")[name], kind, "middle", seed, shape)


SIZES: Final = ((3, 96), (6, 48), (6, 144), (3, 192), (6, 192))
"""Depth and width of the students to choose from, beside 6 x 96 of the main table."""
FEW_SEEDS: Final = range(1, 4)


def sizes_table() -> Iterator[Run]:
    """The default recipe for students of several depths and widths."""
    for seed in FEW_SEEDS:
        for kind in KINDS:
            for depth, width in SIZES:
                shape = {**SHAPE, "n_layer": depth, "n_embd": width}
                yield Run(arms(kind)["A5"], kind, "middle", seed, shape)


TEACHERS_SHAPE: Final = {**SHAPE, "n_embd": 192, "bias": True}


def self_table() -> Iterator[Run]:
    """The teacher distilled into its own shape: it inherits everything, and must not lose it.

    With held-out text, as the command has it: of a gradient of rounding errors Adam makes whole
    steps, and only what is kept as the best holds the start.
    """
    for seed in FEW_SEEDS:
        for name in ("A3", "A5"):
            arm = arms()[name]
            arm = replace(arm, name=f"{name} self", validated=True)
            yield Run(arm, "Vanilla", "small", seed, TEACHERS_SHAPE)


REAL_BUDGETS: Final = {"real": 3e13, "half of real": 1.5e13}
"""What two cores can carry for a teacher of 135M parameters: minutes a run; half for trials."""
REAL_SHAPES: Final = {
    "half": {"n_layer": 11},
    "quarter": {
        "n_layer": 9,
        "n_embd": 384,
        "n_head": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 1024,
    },
}
"""Students of the teacher's own architecture with about that share of its parameters, tied heads.

What is not named is the teacher's: the first has whole blocks of it.
"""
REAL_MAPS: Final = {
    "half": (0, 1, 7, 8, 9, 10, 22, 23, 27, 28, 29),
    "quarter": (0, 1, 7, 10, 22, 23, 27, 28, 29),
}
"""What ``--layer_map measured`` finds on the training text."""


def real_arms(size: str) -> dict[str, Arm]:
    """The arms for a student of the real teacher.

    A student of the teacher's family inherits far more than a Vanilla one: one of two thirds of its
    blocks, chosen so, is 0.5 nats of KL from it after 104 steps of polish (53,000 tokens). Its head
    is its embeddings and comes with them, so only the tutorial's recipe has a head phase: reading
    what nothing is fitted on took half of the first trials' budget. That one trains a head of its
    own, and has so many parameters more.
    """
    found = {}
    for name, arm in arms(REAL_KIND).items():
        own: dict[str, Any] = {"head_tying": "untie" if arm.head else "tie"}
        if arm.init != "none":
            own["layer_map"] = list(REAL_MAPS[size])
        options = {**arm.options, **own}
        found[name] = replace(arm, options=options, head_phase=arm.head > 0)
    return found


def smollm2_table() -> Iterator[Run]:
    """A real pretrained teacher: the default recipe and what a person would use instead."""
    for seed in FEW_SEEDS:
        for size, shape in REAL_SHAPES.items():
            for name in ("A5", "A3", "A1", "T", "A0"):
                yield Run(real_arms(size)[name], REAL_KIND, "real", seed, dict(shape), "smollm2")


ABOUT_ARMS: Final = {
    "A0": "random start, learns the text itself: the floor",
    "A1": "random start, logit distillation of the whole student",
    "A2": "inherited start and head, learns the text itself",
    "A3": "inherited start and head, logit distillation: the baseline to beat",
    "A4": "random start, blocks, closed-form head, polish",
    "A5": "inherited start, blocks, closed-form head, polish: the default recipe",
    "A6": "inherited start and head, the same polish for the whole budget: no blocks first",
    "A7": "inherited start, blocks and closed-form head only",
    "A8": "A5 up to its polish with an untrained teacher, then polish with the real one",
    "T": "the tutorial's recipe: blocks by MSE on raw states, then the head by KL at temperature 2",
}
PRIMARY_CONTRASTS: Final = (("A5", "A3"), ("A4", "A1"), ("A5", "A6"))
