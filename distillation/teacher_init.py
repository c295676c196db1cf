"""Start the student from the teacher's weights instead of from random ones.

Starting from the teacher is worth as much as the loss (DistilBERT, Sanh et al. 2019,
arXiv:1910.01108; Inheritune, Sanyal et al. 2024, arXiv:2404.08634). Where the widths differ, all
maps are seen through one shared basis, since a skip connection passes states from block to block
unchanged (SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024); a basis of unit vectors is weight
subcloning (Samragh et al. 2023, arXiv:2312.09299).
"""

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from cleangpt.blocks import BlockStack
from cleangpt.errors import UsageError
from cleangpt.heads import head_is_tied
from cleangpt.runtime.module_state import preserved_modes
from cleangpt.runtime.placement import whole_weights
from distillation.family_init import (
    NOT_TAKEN,
    can_copy_layers,
    copy_layers,
    fill_alike,
    other_kinds,
    other_settings,
)
from distillation.head_init import can_copy_head, copy_head
from distillation.shared_basis import SharedBasis, make_plain, set_linear
from distillation.silent_blocks import silence_copies
from distillation.teacher_weights import (
    AttentionWeights,
    BlockWeights,
    LinearMap,
    MLPWeights,
    read_block,
)

_TOKENS_AT_ONCE = 4096
_PROBE = (4, 64)
_SAME = 1e-6
_ROUNDED = 0.02
"""What half precision may lose where a plain multiplier is looked for."""


@torch.no_grad()
def init_from_teacher(
    teacher: BlockStack,
    student: BlockStack,
    layer_map: Sequence[int],
    how: str,
    basis: Float[Tensor, "d_teacher d_student"] | None,
) -> list[str]:
    """Change the student's weights in place.

    Args:
        teacher: Where the weights come from.
        student: Where they go. A block takes what its ``parts`` name.
        layer_map: The teacher block whose output each student block will learn. Its weights come
            from the first teacher block after the one before it (:func:`first_of_groups`). Of
            blocks that start from the same one, only the first writes: the others add nothing until
            they learn to, so that the student does at first what a shallower one would (block
            expansion, Wu et al. 2024, arXiv:2401.02415).
        how: The setting's name, for what is said of it: "pca", "slice" or "layers".
        basis: As for :class:`SharedBasis`; the student's states are to be the teacher's in it. None
            is the identity: the widths must be equal, and the head is copied as well. With the
            teacher's own shape the student then is the teacher.

    Returns:
        What was taken and what could not be, a line each.

    Raises:
        UsageError: If there is no basis and the widths differ.
    """
    lines = []
    exact = basis is None
    sources = first_of_groups(layer_map)
    if basis is None:
        if teacher.hidden_size != student.hidden_size:
            raise UsageError(
                f"init_from_teacher={how!r} copies layers, and the widths are"
                f" {student.hidden_size} and {teacher.hidden_size}.",
                "Choose --init_from_teacher pca, or give the student the teacher's width.",
            )
        if can_copy_layers(teacher, student, sources):
            lines = copy_layers(teacher, student, sources)
            return lines + _after_blocks(teacher, student, sources)
        basis = torch.eye(teacher.hidden_size)
        if how != "layers":
            lines.append("the widths are equal, so whole layers are copied")
    shared = SharedBasis(basis.cpu().float())
    lines += _embeddings(teacher, student, shared)
    lines += _fill_blocks(teacher, student, sources, shared)
    return lines + (_head(teacher, student) if exact else [])


def _fill_blocks(
    teacher: BlockStack, student: BlockStack, sources: Sequence[int], basis: SharedBasis
) -> list[str]:
    """Fill all blocks, each from its source in the teacher."""
    lines = [f"weights of the teacher's blocks {', '.join(map(str, sources))}"]
    taken: dict[str, list[int]] = {}
    named: list[Any] = [
        getattr(student.block(index), "parts", lambda: None)() for index in range(len(sources))
    ]
    needs_sizes = any(getattr(parts, "mlp_gain", None) is not None for parts in named)
    sizes = _state_sizes(teacher, basis) if needs_sizes else [1.0] * teacher.num_blocks
    for index, (source, parts) in enumerate(zip(sources, named, strict=True)):
        with whole_weights(teacher.block(source)):
            if parts is None:
                filled = fill_alike(teacher, student, source, index, basis)
            else:
                filled = _fill_block(read_block(teacher, source), parts, basis, sizes[source])
        for said in dict.fromkeys(filled):
            taken.setdefault(said, []).append(index)
    lines += [f"{said} ({_blocks(where, student.num_blocks)})" for said, where in taken.items()]
    as_built = {index for said in NOT_TAKEN for index in taken.get(said, ())}
    return lines + _after_blocks(teacher, student, sources, as_built)


def _after_blocks(
    teacher: BlockStack, student: BlockStack, sources: Sequence[int], as_built: Collection[int] = ()
) -> list[str]:
    """Silence copies, and name what computes something else than in the teacher."""
    done = silence_copies(student, sources, as_built)
    lines = [f"{said} ({_blocks(where, student.num_blocks)})" for said, where in done.items()]
    return [*lines, *other_kinds(teacher, student, sources), *other_settings(teacher, student)]


def first_of_groups(layer_map: Sequence[int]) -> list[int]:
    """The teacher block that each student block starts from: the first that it has to replace.

    A student block stands for the teacher blocks after its predecessor's, up to its own in the map.
    The last of them expects states that no block has made yet, above all at the entrance: half the
    built-in teacher, at equal width, starts at a KL of 1.1 nats from the first ones and of 3.4 from
    the last ones (3.9 at random). Student blocks of one teacher block share those it stands for.

    Example:
        >>> first_of_groups([1, 3, 5]), first_of_groups([0, 0, 1]), first_of_groups([2, 2])
        ([0, 2, 4], [0, 0, 1], [0, 1])
    """
    sources: list[int] = []
    start = 0
    for target, group in itertools.groupby(layer_map):
        several, stands_for = len(list(group)), target + 1 - start
        sources += [start + k * stands_for // several for k in range(several)]
        start = target + 1
    return sources


def _embeddings(teacher: BlockStack, student: BlockStack, basis: SharedBasis) -> list[str]:
    """Take what the teacher feeds its first block, multipliers and embedding norms included."""
    table: Any = student.model.get_input_embeddings()
    if table.weight.shape[1] != basis.columns.shape[1]:
        return ["not taken: embeddings, which are of another width than the states"]
    rows = min(len(table.weight), len(teacher.model.get_input_embeddings().weight))
    tokens, positions = _entering(teacher, rows, student.context_length)
    factor = _multiplier(student, table.weight)
    lines = [f"embeddings of {rows} tokens"]
    if factor is None:
        lines.append("not taken: what the student does to its embeddings besides scaling them")
        factor = 1.0
    # Further channels of a wider student stay as built: of zeros nothing would ever read or write.
    shared = slice(min(basis.columns.shape))
    table.weight[:rows, shared] = (tokens @ basis.columns / factor)[:, shared].to(table.weight)
    own = _position_table(student)
    if own is None:
        return lines
    if positions.abs().max() < _SAME * tokens.abs().max():
        return [*lines, "not taken: positions, which the teacher does not add to its embeddings"]
    first = int(getattr(own, "offset", 0))  # OPT's first rows are for something else
    rows = min(len(positions), len(own.weight) - first)
    theirs = (positions[:rows] @ basis.columns)[:, shared]
    own.weight[first : first + rows, shared] = theirs.to(own.weight)
    return [*lines, f"embeddings of {rows} positions"]


def _multiplier(student: BlockStack, table: Tensor) -> float | None:
    """What the student multiplies its embeddings by (Gemma, Granite); None if it does more.

    As by the norm of Bloom's.
    """
    with preserved_modes(student.model):
        student.model.eval()
        ids = torch.arange(2, device=student.device)[:, None]
        first, second = student.hidden(student.embed(ids))[:, 0].float()
    seen, held = first - second, (table[0] - table[1]).float()
    factor = float(seen @ held / held.square().sum())
    is_all = (seen - factor * held).norm() <= _ROUNDED * seen.norm()
    return factor if is_all and factor else None


def _position_table(student: BlockStack) -> Any:
    """The student's table of positions; None if it has none."""
    tables = [
        module
        for module in student.model.modules()
        if isinstance(module, nn.Embedding) and module.embedding_dim == student.hidden_size
    ]
    others = [each for each in tables if each is not student.model.get_input_embeddings()]
    return others[0] if len(others) == 1 else None


def _entering(teacher: BlockStack, rows: int, length: int | None) -> tuple[Tensor, Tensor]:
    """What each token and each position adds to the state that enters block 0."""
    device = teacher.device
    limits = [limit for limit in (length, teacher.context_length) if limit is not None]
    with preserved_modes(teacher.model):
        teacher.model.eval()
        vocab = torch.arange(rows, device=device)
        alone = [teacher.embed(ids[:, None])[:, 0] for ids in vocab.split(_TOKENS_AT_ONCE)]
        first = torch.cat([states.float().cpu() for states in alone])
        same = torch.zeros((1, min(limits, default=1)), dtype=torch.long, device=device)
        along = teacher.embed(same)[0].float().cpu()
    table = teacher.model.get_input_embeddings().weight[:rows].detach().float().cpu()
    if table.shape == first.shape:
        shift = first - table
        # Plain tables that are added up: each keeps its own part.
        if (shift - shift[0]).abs().max() <= _SAME * first.abs().max():
            return table, along - table[0]
    return first, along - first[0]


def _state_sizes(teacher: BlockStack, basis: SharedBasis) -> list[float]:
    """Root mean square, in the basis, of the state that enters each block.

    Measured on random tokens, which is near enough; the median, because some positions hold states
    a thousand times larger.
    """
    windows, length = _PROBE
    shape = windows, min(length, teacher.context_length or length)
    ids = torch.randint(teacher.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with preserved_modes(teacher.model):
        teacher.model.eval()
        states = teacher.block_hidden_states(ids.to(teacher.device))
    seen = [state.float().cpu() @ basis.columns for state in states]
    return [float(state.square().mean(-1).sqrt().median()) for state in seen]


def _fill_block(weights: BlockWeights, parts: Any, basis: SharedBasis, size: float) -> list[str]:
    """Fill one student block; ``size`` is that of the teacher's state that enters it."""
    lines = [f"not taken: {what}" for what in weights.missing]
    dropped = False
    if parts.attention is None:
        lines.append("not taken: attention, which does something else in the student")
    elif weights.attention is not None:
        dropped |= _fill_attention(weights.attention, parts, basis)
        heads = min(weights.attention.num_heads, parts.attention.config.n_head)
        what = "attention" if parts.out is not None else "queries and keys"
        lines.append(f"{what} of {heads} heads")
    if weights.mlp is not None:
        dropped |= _fill_mlp(weights.mlp, parts, basis, size)
        kept, neurons = len(parts.mlp.up.weight), len(weights.mlp.up.weight)
        lines.append(f"MLP, {min(kept, neurons)} of {neurons} neurons")
        lines += _other_activation(weights.mlp, parts)
    if dropped:
        lines.append("not taken: biases, which the student's maps do not have")
    return lines


def _fill_attention(weights: AttentionWeights, parts: Any, basis: SharedBasis) -> bool:
    """Set queries, keys and, where there are any, values and output; return as ``set_linear``."""
    query, key, value = map(basis.reading, (weights.query, weights.key, weights.value))
    out = basis.writing(weights.out)
    query_map, key_map, heads = parts.attention.query, parts.attention.key, weights.num_heads
    own_heads = parts.attention.config.n_head
    dropped = query_map.bias is None and bool(query.bias.any())
    if dropped:  # else narrower queries would be fitted with a constant that they cannot have
        query = LinearMap(query.weight, torch.zeros_like(query.bias))
    if query.weight.shape != query_map.weight.shape or heads != own_heads:
        width = len(query_map.weight) // own_heads
        chosen = _loudest_heads(value, out, heads, min(heads, own_heads))
        query, key = _reduced_scores(query, key, heads, chosen, width)
        value, out = _reduced_writes(value, out, heads, chosen, width)
    set_linear(query_map, query)
    # The softmax does not see what all keys have in common.
    set_linear(key_map, LinearMap(key.weight, torch.zeros_like(key.bias)))
    if parts.out is not None:
        dropped |= set_linear(parts.value, value) | set_linear(parts.out, out)
    make_plain(parts.attention_norm)
    return dropped


def _reduced_scores(
    query: LinearMap, key: LinearMap, heads: int, chosen: Sequence[int], width: int
) -> tuple[LinearMap, LinearMap]:
    """Queries and keys of ``width`` per head with the nearest scores."""
    biased = torch.cat([query.weight, query.bias[:, None]], dim=1)
    queries, keys = (each.unflatten(0, (heads, -1)) for each in (biased, key.weight))
    # The scores are divided by sqrt(width).
    ratio = (width / queries.shape[1]) ** 0.5
    pairs = [_low_rank(queries[head] * ratio, keys[head], width) for head in chosen]
    left, right = (torch.cat(each) for each in zip(*pairs, strict=True))
    return LinearMap(left[:, :-1], left[:, -1]), LinearMap(right, torch.zeros(len(right)))


def _reduced_writes(
    value: LinearMap, out: LinearMap, heads: int, chosen: Sequence[int], width: int
) -> tuple[LinearMap, LinearMap]:
    """Values of ``width`` per head and an output with the nearest products."""
    values, outs = (each.unflatten(0, (heads, -1)) for each in (value.weight, out.weight.T))
    pairs = [_low_rank(outs[head], values[head], width) for head in chosen]
    left, right = (torch.cat(each) for each in zip(*pairs, strict=True))
    # Attention weights add up to one: a bias of the values is one of the output.
    constant = out.bias + out.weight @ value.bias
    return LinearMap(right, torch.zeros(len(right))), LinearMap(left.T, constant)


def _low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ``left.T @ right`` as such a product over ``rank`` rows.

    Both factors get the same size; rows that are not needed are zero.
    """
    left_basis, left_core = torch.linalg.qr(left.T)
    right_basis, right_core = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    root = values[:rank].sqrt()
    pair = (left_basis @ u[:, :rank] * root).T, root[:, None] * v[:rank] @ right_basis.T
    first, second = (torch.cat([x, x.new_zeros(rank - len(x), x.shape[1])]) for x in pair)
    return first, second


def _loudest_heads(value: LinearMap, out: LinearMap, heads: int, count: int) -> list[int]:
    """The heads that write most, in their order."""
    values, outs = (each.unflatten(0, (heads, -1)) for each in (value.weight, out.weight.T))
    # |O V|^2 = trace(O'O VV'), without a matrix of d x d per head.
    loudness = (outs @ outs.mT * (values @ values.mT)).sum((1, 2))
    chosen: list[int] = loudness.topk(count).indices.sort().values.tolist()
    return chosen


def _fill_mlp(weights: MLPWeights, parts: Any, basis: SharedBasis, size: float) -> bool:
    up, down = basis.reading(weights.up), basis.writing(weights.down)
    count = len(parts.mlp.up.weight)
    if count < len(up.weight):
        loudness = up.weight.norm(dim=1) * down.weight.norm(dim=0)
        chosen = loudness.topk(count).indices.sort().values
        up, down = up.rows(chosen), LinearMap(down.weight[:, chosen], down.bias)
    if parts.mlp_gain is not None:
        # Such a block passes on its input at unit size, where the teacher passes on a larger one.
        down = down.times(1 / (size * float(parts.mlp_gain)))
    make_plain(parts.mlp_norm)
    return set_linear(parts.mlp.up, up) | set_linear(parts.mlp.down, down)


def _other_activation(weights: MLPWeights, parts: Any) -> list[str]:
    """A line if the student's neurons answer otherwise than the teacher's."""
    sample = torch.linspace(-3, 3, 61)
    theirs = ACT2FN[weights.activation](sample) if weights.activation in ACT2FN else None
    if theirs is not None and (theirs - parts.mlp.act(sample)).abs().max() < 0.01:
        return []
    return [f"not taken: the MLP's activation, {weights.activation!r} in the teacher"]


def _head(teacher: BlockStack, student: BlockStack) -> list[str]:
    """Copy final norm and head where they are of one kind."""
    same_kind = type(teacher.lm_head) is type(student.lm_head)
    if not same_kind or not can_copy_head(teacher, student, stitched=False):
        return ["not taken: final norm and head, which are of another kind"]
    if head_is_tied(student):
        student.final_norm.load_state_dict(teacher.final_norm.state_dict())
        return ["final norm"]
    copy_head(teacher, student)
    return ["final norm and head"]


def _blocks(indices: Sequence[int], count: int) -> str:
    return "all blocks" if len(indices) == count else f"blocks {', '.join(map(str, indices))}"
