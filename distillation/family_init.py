"""A student of the teacher's own architecture: whole layers of it, or what of them is loudest.

Of equal sizes, layers are copied as they are, whatever is in them (DistilBERT, Sanh et al. 2019,
arXiv:1910.01108). A narrower student keeps the heads and neurons that write most (Minitron,
Muralidharan et al. 2024, arXiv:2407.14679), and sees the residual stream through the shared basis,
in which RMS norms, rotary positions and gates work as in the teacher (SliceGPT, Ashkboos et al.
2024, arXiv:2401.15024).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.runtime.placement import whole_tensor, whole_weights
from distillation.shared_basis import SharedBasis, make_plain, set_linear
from distillation.teacher_weights import (
    ATTENTION,
    ATTENTION_NORM,
    MLP_NORM,
    OUT,
    POST_NORMS,
    UP_DOWN,
    LinearMap,
    Norm,
    attention_maps,
    first_part,
    fused_name,
    fused_rows,
    linear_map,
    read_norm,
    repeated,
)

_KINDS_OF_LAYERS = ("layer_types", "no_rope_layers")


def can_copy_layers(teacher: BlockStack, student: BlockStack) -> bool:
    """Whether both are of one class, and every block of the student fits one of the teacher's."""
    theirs = _shapes(teacher.block(0))
    return type(teacher.model) is type(student.model) and all(
        _shapes(student.block(index)) == theirs for index in range(student.num_blocks)
    )


@torch.no_grad()
def copy_layers(teacher: BlockStack, student: BlockStack, sources: Sequence[int]) -> list[str]:
    """Copy all there is: the student computes what the teacher would with these blocks alone.

    Of tables with other numbers of rows, those that both have are copied.

    Args:
        teacher: Where the weights come from.
        student: Where they go; :func:`can_copy_layers` must hold.
        sources: The teacher block that each student block is a copy of.

    Returns:
        What was taken, a line each.
    """
    lines = [f"the student is a {type(student.model).__name__} too: whole layers are copied"]
    lines.append(f"weights of the teacher's blocks {', '.join(map(str, sources))}")
    for index, source in enumerate(sources):
        with whole_weights(teacher.block(source)):
            student.block(index).load_state_dict(teacher.block(source).state_dict())
    in_blocks = {
        id(tensor)
        for stack in (teacher, student)
        for index in range(stack.num_blocks)
        for tensor in stack.block(index).state_dict(keep_vars=True).values()
    }
    theirs = teacher.model.state_dict(keep_vars=True)
    for name, own in student.model.state_dict(keep_vars=True).items():
        if id(own) not in in_blocks:
            whole = whole_tensor(teacher.model, name, theirs[name])
            rows = min(len(own), len(whole)) if own.ndim else 0
            (own[:rows] if own.ndim else own).copy_(whole[:rows] if own.ndim else whole)
    lines.append("embeddings, final norm and head")
    return lines + _other_kinds(teacher, student, sources)


def _shapes(block: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    """Names and shapes of what a block holds; packed numbers of a quantised one are no weights."""
    state = block.state_dict()
    return {name: (each.shape, each.is_floating_point()) for name, each in state.items()}


def _other_kinds(teacher: BlockStack, student: BlockStack, sources: Sequence[int]) -> list[str]:
    """A line for blocks whose source looks at other positions, as by a sliding window."""
    lines = []
    for name in _KINDS_OF_LAYERS:
        theirs, own = (getattr(_config(stack), name, None) for stack in (teacher, student))
        if not theirs or not own:
            continue
        differ = [i for i, source in enumerate(sources) if own[i] != theirs[source]]
        if differ:
            shown = ", ".join(f"{i} ({own[i]}, from {theirs[sources[i]]})" for i in differ)
            lines.append(f"not the teacher's: {name} of the student's blocks {shown}")
    return lines


def fill_alike(
    teacher: BlockStack, student: BlockStack, source: int, index: int, basis: SharedBasis
) -> list[str]:
    """Fill a block from one of the same class, whatever the widths, as far as both are understood.

    Args:
        teacher: Where the weights come from.
        student: Where they go.
        source: The teacher's block.
        index: The student's.
        basis: How the student sees the teacher's states.

    Returns:
        What was taken and what was not, a line each.
    """
    theirs: Any = teacher.block(source)
    own: Any = student.block(index)
    if type(theirs) is not type(own):
        return ["not taken: blocks, since the student's are of another kind and name no parts"]
    normed_after = any(hasattr(theirs, name) for name in POST_NORMS)
    if normed_after or not getattr(theirs, "do_layer_norm_before", True):
        return ["not taken: blocks, whose layout is not known here"]
    pair = _Pair(teacher, student, theirs, own, basis)
    return [*pair.fill_attention(), *pair.fill_mlp()]


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two blocks of one class."""

    teacher: BlockStack
    student: BlockStack
    theirs: Any
    own: Any
    basis: SharedBasis

    def fill_attention(self) -> list[str]:
        """Take the loudest heads, in their groups."""
        theirs, own = (first_part(block, ATTENTION) for block in (self.theirs, self.own))
        (heads, groups), (own_heads, own_groups) = map(_heads, (self.teacher, self.student))
        maps, own_maps = attention_maps(theirs, heads), attention_maps(own, own_heads)
        out, norm = first_part(theirs, OUT), self._norm(ATTENTION_NORM)
        if maps is None or own_maps is None or out is None or norm is None:
            return ["not taken: attention, whose layout is not known here"]
        width = len(maps[0].weight) // heads
        if width != len(own_maps[0].weight) // own_heads:
            return [f"not taken: attention, whose heads are {width} wide in the teacher"]
        if own_heads == own_groups:
            maps[1:] = [repeated(shared, heads, width) for shared in maps[1:]]
            groups = heads
        if own_groups > groups or own_heads // own_groups > heads // groups:
            return ["not taken: attention, of which the student has more heads"]
        written = self._written(out)
        sizes = (heads, groups), (own_heads, own_groups)
        chosen = _loudest_groups(maps[2].after(norm), written, *sizes)
        shared = chosen[:, 0] // (heads // groups)
        kept = [
            self.basis.reading(linear.after(norm).rows(_rows(picked, width)))
            for linear, picked in zip(maps, (chosen.flatten(), shared, shared), strict=True)
        ]
        columns = written.weight[:, _rows(chosen.flatten(), width)]
        writing = self.basis.writing(LinearMap(columns, written.bias))
        dropped = _set_maps(own, kept, own_heads) | set_linear(first_part(own, OUT), writing)
        self._make_plain(ATTENTION_NORM)
        for name in ("q_norm", "k_norm"):
            if hasattr(own, name):
                getattr(own, name).load_state_dict(getattr(theirs, name).state_dict())
        return [f"attention of {own_heads} heads", *_dropped(dropped)]

    def fill_mlp(self) -> list[str]:
        """Take the loudest neurons, gated ones or not."""
        theirs, own = (getattr(block, "mlp", block) for block in (self.theirs, self.own))
        norm, names = self._norm(MLP_NORM), _mlp_names(theirs)
        if norm is None or names is None:
            return ["not taken: MLP, whose layout is not known here"]
        *reading, last = names
        inputs = [linear_map(getattr(theirs, name)).after(norm) for name in reading]
        down = self._written(getattr(theirs, last))
        neurons = len(inputs[0].weight)
        kept = min(neurons, len(linear_map(getattr(own, reading[0])).weight))
        loudness = down.weight.norm(dim=0)
        for linear in inputs:
            loudness = loudness * linear.weight.norm(dim=1)
        chosen = loudness.topk(kept).indices.sort().values
        writing = self.basis.writing(LinearMap(down.weight[:, chosen], down.bias))
        dropped = set_linear(getattr(own, last), writing)
        for name, linear in zip(reading, inputs, strict=True):
            dropped |= set_linear(getattr(own, name), self.basis.reading(linear.rows(chosen)))
        self._make_plain(MLP_NORM)
        return [f"MLP, {kept} of {neurons} neurons", *_dropped(dropped)]

    def _norm(self, names: tuple[str, ...]) -> Norm | None:
        return read_norm(first_part(self.theirs, names), _config(self.teacher))

    def _make_plain(self, names: tuple[str, ...]) -> None:
        make_plain(first_part(self.own, names))

    def _written(self, module: Any) -> LinearMap:
        """A map to the stream, for a student that multiplies by its own factor (Granite)."""
        theirs, own = (
            float(getattr(block, "residual_multiplier", 1.0)) for block in (self.theirs, self.own)
        )
        return linear_map(module).times(theirs / own)


def _config(stack: BlockStack) -> Any:
    return stack.model.config.get_text_config()


def _heads(stack: BlockStack) -> tuple[int, int]:
    """Heads, and groups of them that share keys and values."""
    config = _config(stack)
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def _loudest_groups(
    values: LinearMap, out: LinearMap, theirs: tuple[int, int], own: tuple[int, int]
) -> Tensor:
    """The heads that write most, [groups, heads per group], of the groups that write most."""
    (heads, groups), (own_heads, own_groups) = theirs, own
    written = out.weight.T.unflatten(0, (heads, -1))
    read = values.weight.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, dim=0)
    # |O V|^2 = trace(O'O VV'), without a matrix of d x d per head.
    loudness = (written @ written.mT * (read @ read.mT)).sum((1, 2)).view(groups, -1)
    best = loudness.topk(own_heads // own_groups)
    picked = best.values.sum(1).topk(own_groups).indices.sort().values
    inside = best.indices[picked].sort(dim=1).values
    return picked[:, None] * (heads // groups) + inside


def _rows(heads: Tensor, width: int) -> Tensor:
    """The rows of so many heads."""
    return (heads[:, None] * width + torch.arange(width)).flatten()


def _set_maps(own: Any, maps: Sequence[LinearMap], heads: int) -> bool:
    """Set queries, keys and values, in one matrix or in three; return as ``set_linear``."""
    name = fused_name(own)
    if name is None:
        named = zip(("q_proj", "k_proj", "v_proj"), maps, strict=True)
        dropped = [set_linear(getattr(own, part), linear) for part, linear in named]
        return any(dropped)
    weight, bias = (
        torch.cat([getattr(linear, part) for linear in maps]) for part in ("weight", "bias")
    )
    back = fused_rows(name, len(weight), heads).flatten().argsort()
    return set_linear(getattr(own, name), LinearMap(weight[back], bias[back]))


def _mlp_names(mlp: Any) -> tuple[str, ...] | None:
    """The maps of an MLP: those that read the stream, then the one that writes to it."""
    if hasattr(mlp, "gate_proj"):
        return "gate_proj", "up_proj", "down_proj"
    return next((pair for pair in UP_DOWN if all(hasattr(mlp, name) for name in pair)), None)


def _dropped(dropped: bool) -> list[str]:
    return ["not taken: biases, which the student's maps do not have"] if dropped else []
