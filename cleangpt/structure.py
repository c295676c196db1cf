"""Where a causal LM's blocks and final norm are, found by structure and by watching it run.

Names differ between families; what flows does not. Used by ``blocks``, which is what to read next.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleangpt.errors import InputError

KINDS_OF_BLOCKS = ("layer_types", "no_rope_layers", "attention_layers", "mlp_layer_types")
"""Fields of configurations that say something of every block, in a list."""


def with_blocks(config: Any, sources: Sequence[int]) -> Any:
    """A copy of a transformers configuration for other blocks.

    Args:
        config: The configuration.
        sources: For each block of the copy, the block whose kind it is of; past the last one they
            begin anew.

    Raises:
        Exception: What the family raises of a field that is computed and cannot be set.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = len(sources)
    for name in KINDS_OF_BLOCKS:
        kinds = getattr(text, name, None)
        if kinds:
            setattr(text, name, [kinds[source % len(kinds)] for source in sources])
    if getattr(text, "attention_types", None):  # GPT-Neo keeps the list, and writes this
        text.attention_types = [[list(text.attention_layers), 1]]
    return config


def find_blocks(model: nn.Module, num_layers: int, blocks_path: str | None) -> nn.ModuleList:
    """The outermost ``ModuleList`` as long as the config's layer count.

    Args:
        model: The causal LM.
        num_layers: How many blocks its configuration names.
        blocks_path: Dotted name of the list, for a model where the rule is ambiguous.

    Raises:
        InputError: If there is no such list, or more than one.
    """
    if blocks_path is not None:
        found = dict(model.named_modules()).get(blocks_path)
        if isinstance(found, nn.ModuleList):
            return found
        raise InputError(
            f"blocks_path={blocks_path!r} is not a ModuleList of {type(model).__name__}.",
            f"ModuleLists there are: {', '.join(_module_lists(model)) or 'none'}.",
        )
    candidates = {
        name: module for name, module in _module_lists(model).items() if len(module) == num_layers
    }
    outermost = {
        name: module
        for name, module in candidates.items()
        if not any(name.startswith(f"{other}.") for other in candidates)
    }
    if len(outermost) == 1:
        return next(iter(outermost.values()))
    raise InputError(
        f"{len(outermost)} lists of {num_layers} blocks found in {type(model).__name__}"
        f" (looked for one ModuleList of length config.num_hidden_layers={num_layers});"
        f" candidates: {', '.join(outermost or _module_lists(model)) or 'none'}.",
        "Name the right one with blocks_path, or use a decoder-only transformer.",
    )


def _module_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }


@torch.no_grad()
def find_final_norm(
    model: nn.Module, last_block: nn.Module, head: nn.Module, run: Callable[[], Any]
) -> nn.Module:
    """Watch a forward pass for the module between the last block's output and the head.

    First choice is the module that maps the one to the head's very input. Where more happens in
    between (MiniCPM3 divides, ModernBERT's decoder has a dense layer), it is the outermost module
    that reads the last block's output and has not the head inside. Where the head reads the last
    block's output itself (GPT-1), it is an identity.

    Args:
        model: The causal LM.
        last_block: Its last block.
        head: Its output projection.
        run: Runs a forward pass of the model.

    Raises:
        InputError: If there is no such module.
    """
    calls, given, wanted = _watch(model, last_block, head, run)
    # The tensors are kept alive until here, so equal addresses mean the same memory. Addresses
    # and not identity: models reshape or slice (a view) between the norm and the head.
    readers = [call for call in calls if call[1].data_ptr() == given.data_ptr()]
    exact = [module for module, _, made in readers if made.data_ptr() == wanted.data_ptr()]
    if exact:
        return exact[-1]
    if given.data_ptr() == wanted.data_ptr():
        return nn.Identity()
    # Hooks fire when a module is done, so the outermost of those that read the state comes last.
    outer = [
        module
        for module, _, made in readers
        if head not in set(module.modules()) and made.shape == given.shape
    ]
    if outer:
        return outer[-1]
    raise InputError(
        f"No single module of {type(model).__name__} maps the last block's output"
        " to the head's input.",
        "Such a model cannot be distilled: it needs a final norm between blocks and head.",
    )


def _watch(
    model: nn.Module, last_block: nn.Module, head: nn.Module, run: Callable[[], Any]
) -> tuple[list[tuple[nn.Module, Tensor, Tensor]], Tensor, Tensor]:
    """All calls from one tensor to one, what left the last block, and what entered the head."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    ends: dict[str, Tensor] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, args[0], output))

    def record_last_block(module: nn.Module, args: Any, output: Any) -> None:
        ends["block"] = first_output(output)

    def record_head(module: nn.Module, args: Any, output: Any) -> None:
        ends["head"] = args[0]

    handles = [module.register_forward_hook(record) for module in model.modules()]
    handles.append(last_block.register_forward_hook(record_last_block))
    handles.append(head.register_forward_hook(record_head))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls, ends["block"], ends["head"]


def first_output(output: Any) -> Tensor:
    """A block's raw output: some families return it first in a tuple or list."""
    state: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return state


def count_parameters(model: nn.Module) -> int:
    """Parameters as stored; a tensor that two modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
