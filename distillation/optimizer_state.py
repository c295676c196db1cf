"""An optimizer's state as a checkpoint holds it: tensors and plain numbers, and back."""

from typing import Any

from torch import Tensor

from cleangpt.errors import CheckpointError

Tensors = dict[str, Tensor]
Values = dict[str, Any]


def optimizer_tensors(optimizer: Any) -> tuple[Tensors, Values]:
    """An optimizer's state as tensors and plain numbers, by parameter and name.

    Raises:
        CheckpointError: If it holds something else.
    """
    tensors: Tensors = {}
    values: Values = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            elif is_plain(value):
                values[f"{index}/{key}"] = value
            else:
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} under {key!r};"
                    " a checkpoint cannot hold that.",
                    "Use another optimizer_cls, or make no checkpoints inside stages"
                    " (checkpoint_minutes=0).",
                )
    for index, group in enumerate(optimizer.state_dict()["param_groups"]):
        values |= {
            f"group {index}/{key}": value
            for key, value in group.items()
            if key not in ("params", "lr") and is_plain(value)
        }
    return tensors, values


def is_plain(value: Any) -> bool:
    """Whether JSON gives a value back as it was, up to tuples, which become lists."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def load_optimizer(optimizer: Any, tensors: Tensors, values: Values) -> None:
    """Give an optimizer back what :func:`optimizer_tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    groups = optimizer.state_dict()["param_groups"]
    for name, value in {**tensors, **values}.items():
        index, key = name.split("/", 1)
        if index.startswith("group "):
            groups[int(index.removeprefix("group "))][key] = value
        else:
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
