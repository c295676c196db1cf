"""Settings survive JSON, and their flags parse back to the same values."""

import dataclasses
import json
from typing import Any

from hypothesis import given, settings, strategies as st

from cleangpt.runtime.precision import PRECISIONS
from distillation.commands.flags import TRACKER_NAMES, build_parser
from distillation.config import BLOCK_INPUTS, BLOCK_SCHEDULES, CACHES, DistillationConfig
from distillation.layer_map import LAYER_MAPS
from distillation.losses import DistillationLoss

SETTINGS = settings(max_examples=25, deadline=None)
rates = st.floats(0.0, 0.99)
temperatures = st.floats(0.01, 100.0)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "distill_loss_type": st.sampled_from(DistillationLoss.LOSS_TYPES),
    "distill_loss_temperature": temperatures,
    "use_stitching_layers": st.booleans(),
    "stitching_layer_bias": st.booleans(),
    "freeze_previous_blocks": st.booleans(),
    "logit_loss_type": st.sampled_from(["mse", "kl_div", "ce"]),
    "logit_loss_temperature": temperatures,
    "logit_loss_weight": st.floats(0.0, 100.0),
    "gradient_accumulation_steps": st.integers(1, 64),
    "lr_schedule": st.sampled_from(["constant", "cosine", "linear"]),
    "warmup_ratio": rates,
    "min_lr_ratio": rates,
    "max_nonfinite_in_a_row": st.integers(1, 99),
    "first_hidden_position": st.integers(0, 9),
    "activation_cache": st.sampled_from(CACHES),
    "activation_cache_gb": st.floats(0.001, 1000.0),
    "activation_dtype": st.sampled_from(["fp32", "bf16"]),
    "keep_activations": st.booleans(),
    "schedule": st.sampled_from(BLOCK_SCHEDULES),
    "block_inputs": st.sampled_from(BLOCK_INPUTS),
    "layer_map": st.one_of(
        st.sampled_from(LAYER_MAPS), st.lists(st.integers(0, 99), min_size=1, max_size=9)
    ),
    "blocks": st.one_of(st.none(), st.lists(st.integers(0, 99), min_size=1, max_size=9)),
    "precision": st.sampled_from(PRECISIONS),
    "compile_blocks": st.booleans(),
    "checkpoint_minutes": st.floats(0.0, 1e4),
    "checkpoint_steps": st.integers(0, 10**6),
    "log_interval": st.integers(1, 999),
    "hidden_state_pictures": st.booleans(),
    "track": st.lists(st.sampled_from(TRACKER_NAMES), unique=True),
    "seed": st.integers(0, 2**31),
    "init_from_teacher": st.sampled_from(["none", "pca", "slice", "layers"]),
    "stitch_equal_widths": st.booleans(),
    "train_stitches": st.booleans(),
    "stitch_start": st.sampled_from(["random", "least_squares"]),
    "head_start": st.sampled_from(["least_squares", "fold"]),
    "head_tying": st.sampled_from(["untie", "tie"]),
    "polish_hidden_weight": st.floats(0, 1e6),
    "polish_hidden_fade": st.booleans(),
    "audit_tokens": st.integers(0, 10**6),
    "early_stop_patience": st.integers(0, 100),
    "overfit_gate": st.booleans(),
}
TOGETHER = [  # schedule, block_inputs, freeze_previous_blocks
    ("sequential", "student", False),
    *(("sequential", inputs, True) for inputs in BLOCK_INPUTS),
    *(("parallel_local", inputs, True) for inputs in ("student", "teacher")),
    ("decoupled", "teacher", True),
]
VALUES = st.builds(
    lambda values, together: {
        **values,
        **dict(zip(("schedule", "block_inputs", "freeze_previous_blocks"), together, strict=True)),
    },
    st.fixed_dictionaries(FIELDS),
    st.sampled_from(TOGETHER),
).filter(
    lambda values: values["activation_cache"] in ("auto", "disk") or not values["keep_activations"]
)
NEGATIVES = {
    "use_stitching_layers": "no_stitching_layers",
    "stitching_layer_bias": "no_stitching_layer_bias",
    "freeze_previous_blocks": "no_freeze_previous_blocks",
    "stitch_equal_widths": "no_stitch_equal_widths",
    "train_stitches": "no_train_stitches",
    "polish_hidden_fade": "no_polish_hidden_fade",
    "overfit_gate": "no_overfit_gate",
}


def test_every_setting_is_covered() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(DistillationConfig)}


@SETTINGS
@given(values=VALUES)
def test_json_round_trip(values: dict[str, Any]) -> None:
    config = DistillationConfig(**values)
    assert DistillationConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@SETTINGS
@given(values=VALUES)
def test_flags_parse_back(values: dict[str, Any]) -> None:
    flags: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if value is False:
            flags += [f"--{NEGATIVES[name]}"] if name in NEGATIVES else []
        elif value is True:
            flags.append(f"--{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", ",".join(map(str, value))]
        else:
            flags += [f"--{name}", repr(value).strip("'")]
    parsed = build_parser().parse_args(flags)
    assert {name: getattr(parsed, name) for name in values} == values
