"""A causal language model seen as: what enters block 0 -> blocks -> final norm -> head.

``BlockStack`` works on any HuggingFace causal LM, and on our students, through hooks on the model's
own modules. It re-implements nothing, so masks, positions and rotary tables are the model's own. It
does not know what the states are used for.

Hidden states are always raw block outputs. The ``hidden_states`` tuple of ``transformers`` is never
read: its last entry is taken after the final norm, silently a different quantity from the others.

Axis names used in this project's annotations: batch, seq (tokens), positions (batch x seq, valid
ones), vocab, d_model (a model's hidden size), d_state (width of what flows between blocks),
d_student, d_teacher, heads, d_head.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from cleangpt.errors import InputError
from cleangpt.runtime.module_state import preserved_modes
from cleangpt.structure import find_blocks, find_final_norm, first_output

TokenIds = Int[Tensor, "batch seq"]
Mask = Shaped[Tensor, "batch seq"]
State = Float[Tensor, "batch seq d_state"]
HiddenStates = Float[Tensor, "batch seq d_model"]


@runtime_checkable
class ReadsHiddenStates(Protocol):
    """A model whose blocks exchange more than one hidden state, and which knows how to read it."""

    def read_hidden_states(self, state: Tensor) -> Tensor:
        """Return the hidden state, shape [batch, seq, d_model], contained in a block's output."""
        ...


class _StopForward(Exception):  # noqa: N818 - a control signal between two hooks, never an error
    """Raised in a hook to leave a forward pass once the wanted state is there."""


class BlockStack:
    """The blocks, final norm and head of a causal LM, found by structure.

    Args:
        model: A HuggingFace causal LM, or one of our students.
        blocks_path: Dotted name of the ``ModuleList`` of blocks, for a model where the structural
            rule (the outermost ``ModuleList`` of ``config.num_hidden_layers``) is ambiguous.

    Raises:
        InputError: If the blocks cannot be found, or are ambiguous without ``blocks_path``.
    """

    def __init__(self, model: nn.Module, blocks_path: str | None = None) -> None:
        self.model = cast("Any", model)
        # Models that also see or hear keep the language model's sizes in a configuration inside.
        self._config: Any = self.model.config.get_text_config()
        self._blocks = find_blocks(model, int(self._config.num_hidden_layers), blocks_path)
        self.num_blocks = len(self._blocks)
        self.hidden_size = int(self._config.hidden_size)
        parameters = inspect.signature(type(model).forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._takes_position_ids = "position_ids" in parameters
        self._fixed_arguments = {
            name: False
            for name in ("use_cache", "output_hidden_states")
            if takes_any or name in parameters
        }

    @property
    def lm_head(self) -> Any:
        """The output projection: the model's own module, shape [vocab, d_model] in its weight."""
        return self.model.get_output_embeddings()

    @property
    def vocab_size(self) -> int:
        """Rows of the head, padded rows included."""
        head = self.lm_head
        # The weight of a head of low rank is a product that would be made to be measured.
        return int((head.up if hasattr(head, "up") else head).weight.shape[0])

    @property
    def context_length(self) -> int | None:
        """The longest sequence the model takes, in tokens; None if its config sets no limit."""
        limit = getattr(self._config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters live."""
        return next(iter(self.model.parameters())).device

    @cached_property
    def final_norm(self) -> nn.Module:
        """The module between the last block's output and the head.

        Raises:
            InputError: If no single module maps the one to the other.
        """
        if isinstance(self.model, ReadsHiddenStates):
            norm: nn.Module = cast("Any", self.model).final_norm
            return norm
        ids = self.probe_ids()
        with preserved_modes(self.model):
            self.model.eval()
            return find_final_norm(
                self.model,
                self.block(self.num_blocks - 1),
                self.lm_head,
                lambda: self.model(**self._arguments(ids, None)),
            )

    def block(self, index: int) -> nn.Module:
        """The module of block ``index``."""
        return self._blocks[index]

    def hidden(self, state: Float[Tensor, "*positions d_state"]) -> Float[Tensor, "*positions d"]:
        """The hidden state contained in a block's output: the same tensor for most models."""
        if isinstance(self.model, ReadsHiddenStates):
            return self.model.read_hidden_states(state)
        return state

    def with_hidden(self, state: State, hidden: HiddenStates) -> State:
        """The state that holds ``hidden``; what else there is in it is that of ``state``.

        Raises:
            InputError: If the model does not say how its hidden state lies in its state.
        """
        if not isinstance(self.model, ReadsHiddenStates):
            return hidden
        if not hasattr(self.model, "replace_hidden_states"):
            raise InputError(
                f"{type(self.model).__name__} reads hidden states from a wider state, and does not"
                " say how to put others there.",
                "Give it replace_hidden_states(state, hidden), beside read_hidden_states.",
            )
        replaced: Tensor = cast("Any", self.model).replace_hidden_states(state, hidden)
        return replaced

    def head_features(
        self, state: Float[Tensor, "*positions d_state"]
    ) -> Float[Tensor, "*positions d"]:
        """What the head reads: the final norm of the hidden state."""
        features: Tensor = self.final_norm(self.hidden(state))
        return features

    def embed(self, input_ids: TokenIds, attention_mask: Mask | None = None) -> State:
        """What enters block 0: positions, embedding norms and multipliers included."""
        return self.state_entering(0, input_ids, attention_mask)

    def state_entering(
        self, index: int, input_ids: TokenIds, attention_mask: Mask | None = None
    ) -> State:
        """What enters block ``index``; ``index == num_blocks`` is the last block's raw output.

        Only the blocks before ``index`` run, and only the returned state is kept.
        """
        if index == self.num_blocks:
            return self._run(input_ids, attention_mask, stop_after=index - 1)[-1]
        kept: list[Tensor] = []

        def keep_input(module: nn.Module, args: Any, kwargs: Any) -> None:
            kept.append(_first_input(args, kwargs))
            raise _StopForward

        # Before all other hooks: one of a block that is spread over processes would gather it.
        block = self.block(index)
        hook = block.register_forward_pre_hook(keep_input, with_kwargs=True, prepend=True)
        self._forward_until_stopped(input_ids, attention_mask, [hook])
        return kept[0].to(input_ids.device)

    def block_states(
        self,
        input_ids: TokenIds,
        attention_mask: Mask | None = None,
        *,
        stop_after: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Every state: entry 0 enters block 0, entry i + 1 is block i's raw output.

        Args:
            input_ids: Token ids.
            attention_mask: 1 at valid positions, 0 at padding; None if there is no padding.
            stop_after: Index of the last block to run; None runs all.

        Returns:
            ``stop_after + 2`` tensors of shape [batch, seq, d_state].
        """
        last = self.num_blocks - 1 if stop_after is None else stop_after
        first = self._run(input_ids, attention_mask, stop_after=last, keep_entry=True)
        return tuple(first)

    def block_hidden_states(
        self,
        input_ids: TokenIds,
        attention_mask: Mask | None = None,
        *,
        stop_after: int | None = None,
    ) -> tuple[Tensor, ...]:
        """As :meth:`block_states`, each state read out to shape [batch, seq, d_model]."""
        states = self.block_states(input_ids, attention_mask, stop_after=stop_after)
        return tuple(self.hidden(state) for state in states)

    def advance(
        self, index: int, state: State, input_ids: TokenIds, attention_mask: Mask | None = None
    ) -> State:
        """Run only block ``index`` on ``state`` (what enters it) and return its raw output.

        The blocks before it are bypassed and those after it never run, while the model itself still
        builds masks, positions and rotary tables from ``input_ids``.
        """

        def give_state(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            if args:
                return (state, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": state}

        with self._bypassed(index, state):
            hook = self.block(index).register_forward_pre_hook(give_state, with_kwargs=True)
            return self._run(input_ids, attention_mask, stop_after=index, hooks=[hook])[-1]

    def logits(
        self, input_ids: TokenIds, attention_mask: Mask | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """The model's own logits, soft-caps and scales included."""
        logits: Tensor = self.model(**self._arguments(input_ids, attention_mask)).logits
        return logits

    def logits_of(
        self, state: State, input_ids: TokenIds, attention_mask: Mask | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """The logits after ``state``, the last block's raw output; no block runs.

        The final norm and head are run by the model itself, soft-caps and scales included.
        """
        with self._bypassed(self.num_blocks, state):
            return self.logits(input_ids, attention_mask)

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        stop_after: int,
        keep_entry: bool = False,
        hooks: Sequence[Any] = (),
    ) -> list[Tensor]:
        """Run the model through block ``stop_after``; keep all states, or only the last one."""
        states: list[Tensor] = []

        def keep_input(module: nn.Module, args: Any, kwargs: Any) -> None:
            states.append(_first_input(args, kwargs))

        def keep_output(module: nn.Module, args: Any, output: Any) -> None:
            states.append(first_output(output))

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            states.append(first_output(output))
            raise _StopForward

        handles = list(hooks)
        if keep_entry:
            handles.append(self.block(0).register_forward_pre_hook(keep_input, with_kwargs=True))
            handles += [self.block(i).register_forward_hook(keep_output) for i in range(stop_after)]
        handles.append(self.block(stop_after).register_forward_hook(stop))
        self._forward_until_stopped(input_ids, attention_mask, handles)
        return [state.to(input_ids.device) for state in states]

    def _forward_until_stopped(
        self, input_ids: Tensor, attention_mask: Tensor | None, handles: Sequence[Any]
    ) -> None:
        """Run the model until a hook stops it, and always remove the hooks."""
        try:
            self.model(**self._arguments(input_ids, attention_mask))
        except _StopForward:
            return
        finally:
            for handle in handles:
                handle.remove()
        raise InputError(
            f"{type(self.model).__name__} ran a forward pass without the block that was asked for.",
            "Its blocks may be skipped or wrapped at run time; name them with blocks_path.",
        )

    def _arguments(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """The keyword arguments of a forward pass.

        A mask without padding is dropped, which keeps the fused causal attention kernels in use.
        Left padding needs explicit positions: many families count them from the left edge.
        """
        arguments: dict[str, Any] = {"input_ids": input_ids, **self._fixed_arguments}
        if attention_mask is not None and not bool(attention_mask.all()):
            arguments["attention_mask"] = attention_mask
            if self._takes_position_ids:
                positions = attention_mask.long().cumsum(-1) - 1
                arguments["position_ids"] = positions.clamp(min=0)
        return arguments

    @contextmanager
    def _bypassed(self, count: int, state: Tensor) -> Iterator[None]:
        """Make the first ``count`` blocks return ``state`` without computing anything."""
        count_returned = self._tuple_length
        # The rest of a tuple (weights, indices, caches) is for blocks that do not run.
        result: Any = (state, *[None] * (count_returned - 1)) if count_returned else state

        def return_state(*args: Any, **kwargs: Any) -> Any:
            return result

        replaced: list[tuple[nn.Module, dict[str, Any]]] = []
        # Without its hooks too: those of a block that lies elsewhere would bring its weights.
        stand_in = {"forward": return_state, "_forward_pre_hooks": {}, "_forward_hooks": {}}
        try:
            for index in range(count):
                block = self.block(index)
                own = {name: block.__dict__[name] for name in stand_in if name in block.__dict__}
                replaced.append((block, own))
                block.__dict__.update(stand_in)
            yield
        finally:
            for block, own in replaced:
                del block.__dict__["forward"]
                block.__dict__.update(own)

    def returns_tuples(self) -> bool:
        """Whether a block returns its state in a tuple; finding out runs block 0, once."""
        return self._tuple_length > 0

    @cached_property
    def _tuple_length(self) -> int:
        """How many things a block returns in a tuple (some families); 0 is a tensor (most)."""
        seen: list[int] = []

        def look(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(len(output) if isinstance(output, (tuple, list)) else 0)
            raise _StopForward

        hook = self.block(0).register_forward_hook(look)
        # In eval mode: dropout would draw random numbers that belong to a training step.
        with torch.no_grad(), preserved_modes(self.model):
            self.model.eval()
            self._forward_until_stopped(self.probe_ids(), None, [hook])
        return seen[0]

    def probe_ids(self) -> Tensor:
        """Two token ids, enough to watch a forward pass."""
        return torch.zeros((1, 2), dtype=torch.long, device=self.device)

    def unlike_ids(self, count: int) -> Tensor:
        """A row of token ids that differ, as many as fit, to compare what is computed of them."""
        length = min(count, self.context_length or count)
        return torch.arange(1, length + 1, device=self.device)[None] % self.vocab_size


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a block's arguments: the first, or the keyword all families use."""
    state: Tensor = args[0] if args else kwargs["hidden_states"]
    return state
