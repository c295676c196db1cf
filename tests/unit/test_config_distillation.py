import ast
import dataclasses
import json
from pathlib import Path

import pytest

import config_distillation
from config_distillation import GPTConfig

CONTRACT = json.loads(
    (Path(__file__).parents[1] / "contract" / "contract.json").read_text(encoding="utf-8")
)


def test_the_listed_fields_come_first_with_their_defaults() -> None:
    listed = CONTRACT["GPTConfig"]
    found = [(field.name, field.default) for field in dataclasses.fields(GPTConfig)]
    assert found[: len(listed)] == list(listed.items())
    assert all(field.kw_only for field in dataclasses.fields(GPTConfig)[len(listed) :])


def test_the_tutorial_configuration_is_accepted() -> None:
    config = GPTConfig(
        block_size=128,
        vocab_size=50257,
        n_layer=12,
        padding_idx=0,
        n_embd=384,
        n_head=6,
        dropout=0.1,
        bias=False,
        model_type="Factored",
        output_hidden_states=True,
        teacher_n_embd=768,
    )
    assert GPTConfig(**dataclasses.asdict(config)) == config
    assert GPTConfig(n_layer=2, n_embd=128, n_head=2).vocab_size is None
    assert GPTConfig(padding_idx=None, model_type="MyCustom").padding_idx is None


def test_the_first_line_says_what_block_size_is() -> None:
    assert "context length in tokens" in (GPTConfig.__doc__ or "").splitlines()[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd=100 is not a multiple of n_head=3"),
        ({"n_layer": 0}, "n_layer=0 is not a whole number >= 1"),
        ({"n_head": -1}, "n_head=-1 is not a whole number >= 1"),
        ({"block_size": 0}, "block_size=0 is not a whole number >= 1"),
        ({"n_embd": 38.4}, "n_embd=38.4 is not a whole number >= 1"),
        ({"n_layer": "3"}, "n_layer='3' is not a whole number >= 1"),
        ({"n_layer": None}, "n_layer=None is not a whole number >= 1"),
        ({"n_layer": True}, "n_layer=True is not a whole number >= 1"),
        ({"vocab_size": 0}, "vocab_size=0 is not a whole number >= 1"),
        ({"teacher_n_embd": 0}, "teacher_n_embd=0 is not a whole number >= 1"),
        ({"dropout": 1.0}, r"dropout=1.0 is not a probability in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1 is not a probability in \[0, 1\)"),
        ({"dropout": float("nan")}, r"dropout=nan is not a probability in \[0, 1\)"),
        ({"bias": "yes"}, "bias='yes' is not True or False"),
        ({"use_v": 1}, "use_v=1 is not True or False"),
        ({"padding_idx": -1}, "padding_idx=-1 is not a token id"),
        ({"padding_idx": 10, "vocab_size": 10}, "padding_idx=10 is not below vocab_size=10"),
        ({"model_type": ""}, "model_type='' is not a name"),
        ({"attn_gain": "none"}, "attn_gain='none' is not one of per_head, fixed_one"),
        ({"head_rank": 0}, "head_rank=0 is not a whole number >= 1"),
        ({"head_rank": 385}, "head_rank=385 is above n_embd=384"),
        ({"head_rank": 20, "vocab_size": 19}, "head_rank=20 is above vocab_size=19"),
        ({"final_norm": "rms"}, "final_norm='rms' is not one of layer_norm, folded"),
    ],
)
def test_a_value_out_of_range_is_named(fields: dict[str, object], message: str) -> None:
    config = GPTConfig()
    # Set afterwards, because the tests' own type checker would refuse some of them earlier.
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"n_layer=0 .*; dropout=2.0.*\n.*block_size is the context"
    ):
        GPTConfig(n_layer=0, dropout=2.0)


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(TypeError, match="n_layers"):
        GPTConfig(n_layers=3)  # type: ignore[call-arg]


def test_the_module_imports_only_the_standard_library() -> None:
    tree = ast.parse(Path(config_distillation.__file__).read_text(encoding="utf-8"))
    names = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert names == {"dataclasses", "numbers", "typing"}
