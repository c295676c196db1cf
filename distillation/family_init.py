"""A student of the teacher's own architecture: whole layers of it, or what of them is loudest.

Of equal sizes, layers are copied as they are, whatever is in them (DistilBERT, Sanh et al. 2019,
arXiv:1910.01108). A narrower student keeps the heads and neurons that write most (Minitron,
Muralidharan et al. 2024, arXiv:2407.14679), and sees the residual stream through the shared basis,
in which RMS norms, rotary positions and gates work as in the teacher (SliceGPT, Ashkboos et al.
2024, arXiv:2401.15024).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.heads import head_is_tied
from cleangpt.runtime.placement import whole_tensor, whole_weights
from cleangpt.structure import KINDS_OF_BLOCKS
from distillation.shared_basis import SharedBasis, make_plain, set_linear
from distillation.silent_blocks import adds_to_its_input
from distillation.teacher_weights import (
    ATTENTION,
    ATTENTION_NORM,
    MLP_NORM,
    OUT,
    UP_DOWN,
    LinearMap,
    attention_maps,
    first_part,
    fused_name,
    fused_rows,
    linear_map,
    read_norm,
    repeated,
)

_OTHER_KIND = "not taken: blocks, since the student's are of another kind and name no parts"
_UNKNOWN = "not taken: blocks, whose layout is not known here"
NOT_TAKEN = (_OTHER_KIND, _UNKNOWN)
"""What is said of a block that stays as built."""
_SETTINGS = (
    *("hidden_act", "hidden_activation", "activation_function", "swiglu_limit"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "layernorm_epsilon"),
    *("rope_parameters", "partial_rotary_factor", "rotary_dim", "alibi", "sliding_window"),
    *("attention_multiplier", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "use_qk_norm", "clip_qkv"),
    *("residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale"),
    *("final_logit_softcapping", "parallel_attn", "use_parallel_residual"),
    *("apply_residual_connection_post_layernorm", "num_experts_per_tok", "norm_topk_prob"),
)
"""Fields of configurations that are no sizes, and change what the same weights compute."""
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_QUERY_KEY_NORMS = ("q_norm", "k_norm")


def is_same_class(theirs: nn.Module, own: nn.Module) -> bool:
    """Whether a part of the teacher is of the student's class; FSDP2 makes one derived from it."""
    return isinstance(theirs, type(own))


def can_copy_layers(teacher: BlockStack, student: BlockStack, sources: Sequence[int]) -> bool:
    """Whether both are of one class, and every block of the student is made like its source."""
    return is_same_class(teacher.model, student.model) and all(
        _shapes(student.block(index)) == _shapes(teacher.block(source))
        for index, source in enumerate(sources)
    )


@torch.no_grad()
def copy_layers(teacher: BlockStack, student: BlockStack, sources: Sequence[int]) -> list[str]:
    """Copy all there is: the student computes what the teacher would with these blocks alone.

    Of tables with other numbers of rows, those that both have are copied. A tied head stays the
    student's embeddings.

    Args:
        teacher: Where the weights come from.
        student: Where they go; :func:`can_copy_layers` must hold.
        sources: The teacher block that each student block is a copy of.

    Returns:
        What was taken and what was not, a line each.
    """
    lines = [f"the student is a {type(student.model).__name__} too: whole layers are copied"]
    lines.append(f"weights of the teacher's blocks {', '.join(map(str, sources))}")
    done: set[int] = set()
    for index, source in enumerate(sources):
        own = student.block(index).state_dict(keep_vars=True)
        with whole_weights(teacher.block(source)):
            theirs = _tensors(teacher.block(source))
            for name, tensor in own.items():
                tensor.copy_(theirs[name])
        done |= {id(tensor) for tensor in own.values()}
    return lines + _copy_the_rest(teacher, student, done)


def _copy_the_rest(teacher: BlockStack, student: BlockStack, done: set[int]) -> list[str]:
    """Copy what is in no block, each tensor once; a tied head goes by its name as embeddings."""
    is_tied = head_is_tied(student)
    lines = ["embeddings and final norm" if is_tied else "embeddings, final norm and head"]
    if is_tied and not head_is_tied(teacher):
        lines.append("not taken: the head, which is tied to the embeddings in the student")
    modules = student.model.named_modules()
    head = next(name for name, module in modules if module is student.lm_head)
    table = student.model.get_input_embeddings().weight
    theirs = teacher.model.state_dict(keep_vars=True)
    for name, own in student.model.state_dict(keep_vars=True).items():
        if id(own) in done or (own is table and name.rpartition(".")[0] == head):
            continue
        whole = whole_tensor(teacher.model, name, theirs[name]) if name in theirs else None
        if whole is None or whole.ndim != own.ndim or whole.shape[1:] != own.shape[1:]:
            lines.append(f"not taken: {name}, which is not there in this shape")
            continue
        rows = slice(min(len(own), len(whole))) if own.ndim else ...
        own[rows].copy_(whole[rows])
    return lines


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a module holds; its ``state_dict`` would have the shards of a spread one."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _shapes(block: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    """Names and shapes of what a block holds; packed numbers of a quantised one are no weights."""
    state = block.state_dict()
    return {name: (each.shape, each.is_floating_point()) for name, each in state.items()}


def other_kinds(teacher: BlockStack, student: BlockStack, sources: Sequence[int]) -> list[str]:
    """A line for blocks whose source looks at other positions, as by a sliding window."""
    lines = []
    for name in KINDS_OF_BLOCKS:
        theirs, own = (getattr(_config(stack), name, None) for stack in (teacher, student))
        if not theirs or not own or not is_same_class(teacher.model, student.model):
            continue
        differ = [i for i, source in enumerate(sources) if own[i] != theirs[source]]
        if differ:
            shown = ", ".join(f"{i} ({own[i]}, from {theirs[sources[i]]})" for i in differ)
            lines.append(f"not the teacher's: {name} of the student's blocks {shown}")
    return lines


def other_settings(teacher: BlockStack, student: BlockStack) -> list[str]:
    """A line for each setting by which the same weights compute something else."""
    if not is_same_class(teacher.model, student.model):
        return []
    lines = []
    for name in _SETTINGS:
        theirs, own = (getattr(_config(stack), name, None) for stack in (teacher, student))
        if theirs != own:
            lines.append(f"not the teacher's: {name} is {own}, and {theirs} in the teacher")
    return lines


def fill_alike(
    teacher: BlockStack, student: BlockStack, source: int, index: int, basis: SharedBasis
) -> list[str]:
    """Fill a block from one of the same class, whatever the widths, if both are understood.

    A layout counts as understood if the two parts that are known here hold all of the block's
    parameters, in the shapes that they should have, and add to what enters the block.

    Args:
        teacher: Where the weights come from.
        student: Where they go.
        source: The teacher's block.
        index: The student's.
        basis: How the student sees the teacher's states.

    Returns:
        What was taken and what was not, a line each.
    """
    theirs, own = _Layout(teacher, source), _Layout(student, index)
    if not is_same_class(theirs.block, own.block):
        return [_OTHER_KIND]
    alike = theirs.mlp_names == own.mlp_names and theirs.is_fused == own.is_fused
    if not (theirs.is_known and own.is_known and alike and adds_to_its_input(student, index)):
        return [_UNKNOWN]
    pair = _Pair(theirs, own, basis)
    return [*pair.fill_attention(), *pair.fill_mlp()]


@dataclass(frozen=True, eq=False)
class _Layout:
    """What is known of one block of a family."""

    stack: BlockStack
    index: int

    @property
    def block(self) -> Any:
        """The block."""
        return self.stack.block(self.index)

    @property
    def attention(self) -> Any:
        """Its attention; None if there is none by a known name."""
        return first_part(self.block, ATTENTION)

    @property
    def mlp(self) -> Any:
        """What holds the maps of its MLP: the block itself in some families."""
        return getattr(self.block, "mlp", self.block)

    @property
    def mlp_names(self) -> tuple[str, ...] | None:
        """The maps of the MLP: those that read the stream, then the one that writes to it."""
        gated = ("gate_proj", "up_proj", "down_proj")
        known = (gated, *UP_DOWN)
        return next((n for n in known if all(hasattr(self.mlp, name) for name in n)), None)

    @property
    def is_fused(self) -> bool:
        """Whether queries, keys and values are one matrix."""
        return self.attention is not None and fused_name(self.attention) is not None

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Heads, and groups of them that share keys and values; None if blocks differ in them."""
        config = _config(self.stack)
        try:
            heads = config.num_attention_heads
        except Exception:  # each of its blocks has a number of its own (dots3_note)
            return None
        groups = getattr(config, "num_key_value_heads", None) or heads
        if not isinstance(heads, int) or not isinstance(groups, int):
            return None
        return heads, heads if self.is_fused else groups

    @cached_property
    def maps(self) -> list[LinearMap] | None:
        """Queries, keys and values."""
        parts = [getattr(self.attention, name, None) for name in self._map_names]
        if self.sizes is None or not all(hasattr(part, "weight") for part in parts):
            return None
        return attention_maps(self.attention, self.sizes[0])

    @property
    def _map_names(self) -> tuple[str, ...]:
        fused = fused_name(self.attention)
        return (fused,) if fused else _SEPARATE

    @property
    def width(self) -> int:
        """Of a head."""
        assert self.maps is not None
        assert self.sizes is not None
        return len(self.maps[0].weight) // self.sizes[0]

    @property
    def is_known(self) -> bool:
        """Whether nothing in the block is unaccounted for, and all shapes are as expected."""
        norms = [first_part(self.block, names) for names in (ATTENTION_NORM, MLP_NORM)]
        out = first_part(self.attention, OUT)
        names, maps = self.mlp_names, self.maps
        written = [*norms, out, *(getattr(self.mlp, name) for name in names or ())]
        have_weights = all(getattr(part, "weight", None) is not None for part in written)
        if names is None or maps is None or self.sizes is None or not have_weights:
            return False
        if not getattr(self.block, "do_layer_norm_before", True) or norms[0] is norms[1]:
            return False
        heads, groups = self.sizes
        rows = [heads * self.width, groups * self.width, groups * self.width]
        extra = [getattr(self.attention, n) for n in _QUERY_KEY_NORMS if hasattr(self.attention, n)]
        inner = [getattr(self.attention, name) for name in self._map_names]
        known = [*norms, out, *inner, *extra, *(getattr(self.mlp, name) for name in names)]
        held = {id(parameter) for part in known for parameter in part.parameters()}
        return (
            [len(linear.weight) for linear in maps] == rows
            and linear_map(out).weight.shape[1] == rows[0]
            and all([p.shape for p in part.parameters()] == [(self.width,)] for part in extra)
            and held == {id(parameter) for parameter in self.block.parameters()}
        )


@dataclass(frozen=True, eq=False)
class _Pair:
    """A block of the teacher and one of the student, both understood."""

    theirs: _Layout
    own: _Layout
    basis: SharedBasis

    def fill_attention(self) -> list[str]:
        """Take the loudest heads, in their groups."""
        theirs, own = self.theirs, self.own
        assert theirs.maps is not None
        assert theirs.sizes is not None
        assert own.sizes is not None
        maps, width = list(theirs.maps), theirs.width
        (heads, groups), (own_heads, own_groups) = theirs.sizes, own.sizes
        if width != own.width:
            return [f"not taken: attention, whose heads are {width} wide in the teacher"]
        if own_heads == own_groups:
            maps[1:] = [repeated(shared, heads, width) for shared in maps[1:]]
            groups = heads
        if own_groups > groups or own_heads // own_groups > heads // groups:
            return ["not taken: attention, of which the student has more heads"]
        norm = read_norm(first_part(theirs.block, ATTENTION_NORM), _config(theirs.stack))
        assert norm is not None
        written = self._written(first_part(theirs.attention, OUT))
        sizes = (heads, groups), (own_heads, own_groups)
        chosen = _loudest_groups(maps[2].after(norm), written, *sizes)
        shared = chosen[:, 0] // (heads // groups)
        kept = [
            self.basis.reading(linear.after(norm).rows(_rows(picked, width)))
            for linear, picked in zip(maps, (chosen.flatten(), shared, shared), strict=True)
        ]
        columns = written.weight[:, _rows(chosen.flatten(), width)]
        writing = self.basis.writing(LinearMap(columns, written.bias))
        dropped = _set_maps(own.attention, kept, own_heads)
        dropped |= set_linear(first_part(own.attention, OUT), writing)
        make_plain(first_part(own.block, ATTENTION_NORM))
        for name in _QUERY_KEY_NORMS:
            if hasattr(own.attention, name):
                source = getattr(theirs.attention, name)
                getattr(own.attention, name).weight.copy_(source.weight)
        return [f"attention of {own_heads} heads", *_dropped(dropped)]

    def fill_mlp(self) -> list[str]:
        """Take the loudest neurons, gated ones or not."""
        theirs, own, names = self.theirs, self.own.mlp, self.theirs.mlp_names
        assert names is not None
        norm = read_norm(first_part(theirs.block, MLP_NORM), _config(theirs.stack))
        assert norm is not None
        *reading, last = names
        inputs = [linear_map(getattr(theirs.mlp, name)).after(norm) for name in reading]
        down = self._written(getattr(theirs.mlp, last))
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
        make_plain(first_part(self.own.block, MLP_NORM))
        return [f"MLP, {kept} of {neurons} neurons", *_dropped(dropped)]

    def _written(self, module: Any) -> LinearMap:
        """A map to the stream, for a student that multiplies by its own factor (Granite)."""
        theirs, own = (
            float(getattr(each.block, "residual_multiplier", 1.0))
            for each in (self.theirs, self.own)
        )
        return linear_map(module).times(theirs / own)


def _config(stack: BlockStack) -> Any:
    return stack.model.config.get_text_config()


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
        named = zip(_SEPARATE, maps, strict=True)
        dropped = [set_linear(getattr(own, part), linear) for part, linear in named]
        return any(dropped)
    weight, bias = (
        torch.cat([getattr(linear, part) for linear in maps]) for part in ("weight", "bias")
    )
    back = fused_rows(name, len(weight), heads).flatten().argsort()
    return set_linear(getattr(own, name), LinearMap(weight[back], bias[back]))


def _dropped(dropped: bool) -> Iterable[str]:
    return ["not taken: biases, which the student's maps do not have"] if dropped else []
