"""The model around the blocks, shared by all students: embeddings, final norm, head, cache.

A kind of student is a subclass with a ``config_class`` and a ``block_class`` (see
``model_vanilla_distillation.py``, the shortest). This file knows no kind of block and nothing about
distillation. What trainers rely on: ``wte``, ``wpe``, ``blocks``, ``final_norm`` and ``lm_head`` by
name, blocks that return one tensor (the *state*), and ``read_hidden_states`` from state to width.
"""

import copy
import dataclasses
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration import StudentConfig
from .layers import (
    Context,
    FoldedNorm,
    HeadGain,
    KroneckerMap,
    LowRankHead,
    StudentBlock,
    final_norm,
    output_head,
)

_CACHE_NAME = next(
    field.name
    for field in dataclasses.fields(CausalLMOutputWithPast)
    if field.name in ("past_key_values", "cache")
)
"""What this version of transformers calls the cache in outputs and in ``generate``."""


class StudentModel(PreTrainedModel, GenerationMixin):
    """A causal language model: ``logits = lm_head(final_norm(blocks(wte[id] + wpe[position])))``.

    Args:
        config: A ``GPTConfig``, or any object with its fields, or this class's HuggingFace
            configuration. It is copied, so students never share one.

    Raises:
        ValueError: If ``vocab_size`` is not set, or the configuration is another kind's; from
            ``forward`` if the sequence is longer than ``block_size`` or the mask does not fit.

    ``forward`` returns logits (B, T, vocab_size) and takes:

    Args of forward:
        input_ids: (B, T) token ids.
        attention_mask: (B, past + T), 1 at tokens and 0 at padding. None: no padding. On an
            accelerator, None also allows the fastest kernel: leave it out where it is all 1.
        labels: (B, T) token ids, shifted here as HuggingFace does; -100 is ignored.
        output_hidden_states: Whether to return n_layer + 1 hidden states of width n_embd: the
            embeddings, the blocks' outputs, and in place of the last block's the final norm's
            (one wider with ``final_norm="folded"``).
        position_ids: (B, T). By default the number of real tokens before each position.
        past_key_values: Cache of earlier positions, extended in place.
        cache: The same; its name since transformers 5.24.
        inputs_embeds: (B, T, n_embd) token embeddings in place of ``input_ids``.
        use_cache: Whether to open a cache. None: no, because most calls of a student are training
            steps. One that is given is always used.
        output_attentions: Whether to return the (B, H, T, S) attention weights of each block.
        logits_to_keep: Number of last positions to compute logits for, or their indices.
            0 computes all.
        return_dict: False returns a tuple.
        **kwargs: Passed to the loss, e.g. ``num_items_in_batch``.
    """

    config_class: ClassVar[type[StudentConfig]] = StudentConfig
    block_class: ClassVar[type[StudentBlock]] = StudentBlock

    base_model_prefix = "student"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _input_embed_layer = "wte"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "wte.weight"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave a subclass unmarked for export: only code that it can travel with is copied."""
        super().__init_subclass__(**kwargs)
        if "_auto_class" not in cls.__dict__:
            cls._auto_class = None

    def __init__(self, config: Any) -> None:
        if isinstance(config, PretrainedConfig):
            config = copy.deepcopy(config)
        else:
            config = self.config_class.from_fields(config)
        # By name: exported code may load its configuration and its model as separate modules.
        if config.model_type != self.config_class.model_type:
            raise ValueError(
                f"{type(self).__name__} cannot be built from a {type(config).__name__}.\n"
                f"Pass a GPTConfig or a {self.config_class.__name__}."
            )
        if config.vocab_size is None:
            raise ValueError(
                f"{type(self).__name__} needs vocab_size, which is None.\n"
                "Set vocab_size to the teacher's: teacher.config.vocab_size."
            )
        # HuggingFace would copy this default into ``generate``, which then returns a dictionary.
        output_hidden_states, config.output_hidden_states = config.output_hidden_states, False
        super().__init__(config)
        config.output_hidden_states = output_hidden_states
        self.loss_type = "ForCausalLM"
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.block_class(config, i) for i in range(config.n_layer))
        self.final_norm = final_norm(config)
        self.lm_head = output_head(config, config.vocab_size)
        self.generation_config = GenerationConfig(
            max_length=config.block_size,
            pad_token_id=config.padding_idx,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            use_cache=config.use_cache,
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits, and a loss if there are labels; arguments as in the class docstring."""
        cache = self._open_cache(past_key_values, cache, use_cache)
        embeds = self._token_embeddings(input_ids, inputs_embeds)
        num_past = 0 if cache is None else cache.get_seq_length()
        positions = self._positions(attention_mask, position_ids, embeds, num_past)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        attentions: list[Tensor] | None = [] if output_attentions else None
        context = Context.of(attention_mask, embeds.shape[1], num_past, embeds.device, attentions)

        state = self.initial_state(self.dropout(embeds + self.wpe(positions)))
        for block in self.blocks:
            if hidden is not None:
                hidden.append(self.read_hidden_states(state))
            state = block(state, context=context, past_key_values=cache)
        features = self.final_norm(self.read_hidden_states(state))

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(features[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{_CACHE_NAME: cache},
            hidden_states=None if hidden is None else (*hidden, features),
            attentions=None if attentions is None else tuple(attentions),
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def initial_state(self, embeddings: Tensor) -> Tensor:
        """Return the state that enters block 0. For most students, the embeddings themselves."""
        return embeddings

    def read_hidden_states(self, state: Tensor) -> Tensor:
        """Return the (B, T, n_embd) hidden states of a state. For most students, the same."""
        return state

    def replace_hidden_states(self, state: Tensor, hidden: Tensor) -> Tensor:
        """Return the state with other hidden states, (B, T, n_embd), in it."""
        return hidden

    def adapt_cache(self, cache: Cache) -> None:
        """Prepare a cache before it is used. A kind that caches more than keys and values does."""

    def get_num_params(self) -> int:
        """Return the number of stored parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as HuggingFace does, by default up to the context length.

        That is stored as ``max_length``, since a pipeline's own default, 256 new tokens, would
        leave a short context. ``max_new_tokens``, by itself or in a ``generation_config``, replaces
        it; HuggingFace would log a notice about the two at each call.
        """
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        if kwargs.get("max_new_tokens") is not None:
            kwargs.setdefault("max_length", None)
        elif getattr(given, "max_new_tokens", None) is not None:
            stored = self.generation_config  # beside a generation_config, arguments are deprecated
            self.generation_config = copy.copy(stored)
            self.generation_config.max_length = None
            try:
                return super().generate(*args, **kwargs)
            finally:
                self.generation_config = stored
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the keywords of ``forward`` for one decoding step.

        A subclass may override ``forward`` with the four documented arguments only. It then gets
        the whole sequence at each step, uncached, and nothing that it does not take.
        """
        if self._forward_takes("past_key_values"):
            return super().prepare_inputs_for_generation(input_ids, **kwargs)
        kwargs.update({_CACHE_NAME: None}, next_sequence_length=None, use_cache=False)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {name: value for name, value in inputs.items() if self._forward_takes(name)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward``; ``generate`` always passes ``return_dict``, which it may not take."""
        if "return_dict" in kwargs and not self._forward_takes("return_dict"):
            del kwargs["return_dict"]
        return super().__call__(*args, **kwargs)

    def _forward_takes(self, name: str) -> bool:
        """Whether ``forward``, perhaps a subclass's, accepts this keyword."""
        taken = inspect.signature(self.forward).parameters
        return name in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (KroneckerMap, HeadGain, FoldedNorm)):
            module.init_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise the parts, then let each block set what it starts from.

        Not in ``_init_weights``: transformers takes a module of exported code without parameters
        of its own, as most blocks are, for one that was loaded, and skips it.
        """
        super().initialize_weights()
        for block in self.blocks:
            if isinstance(block, StudentBlock):
                block.init_weights()

    def _get_resized_lm_head(self, old_lm_head: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the head with another number of tokens; of a low-rank one, resize the last map."""
        if not isinstance(old_lm_head, LowRankHead):
            return super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        old_lm_head.up = super()._get_resized_lm_head(old_lm_head.up, *args, **kwargs)
        return old_lm_head

    def _open_cache(
        self, past_key_values: Cache | None, cache: Cache | None, use_cache: bool | None
    ) -> Cache | None:
        if past_key_values is not None and cache is not None:
            raise ValueError(
                "past_key_values and cache are two names of one argument.\nPass one of them."
            )
        cache = past_key_values if cache is None else cache
        if cache is None and not use_cache:
            return None
        if self.training and self.blocks[0].gradient_checkpointing:
            return None  # a block that runs again in the backward pass would append twice
        cache = DynamicCache(config=self.config) if cache is None else cache
        self.adapt_cache(cache)
        return cache

    def _token_embeddings(self, input_ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (embeds is None):
            raise ValueError(
                "forward needs input_ids or inputs_embeds, and not both.\nPass exactly one of them."
            )
        return self.wte(input_ids) if embeds is None else embeds

    def _positions(
        self,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        embeds: Tensor,
        num_past: int,
    ) -> Tensor:
        """Return (B or 1, T) indices into ``wpe``, after checking that the inputs fit."""
        batch, num_new, _ = embeds.shape
        total = num_past + num_new
        if attention_mask is not None and attention_mask.shape != (batch, total):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but {batch} sequences of "
                f"{num_past} cached + {num_new} new positions need ({batch}, {total}).\n"
                "Pass one 0 or 1 per position, cached ones included; other masks are not supported."
            )
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(num_past, total, device=embeds.device)[None]
            else:
                before = attention_mask.long().cumsum(dim=-1) - 1
                position_ids = before.clamp(min=0)[:, num_past:]
        # Padding takes no position, so only a sequence with this many columns can be too long.
        block_size = self.config.block_size
        if total > block_size and int(position_ids.max()) >= block_size:
            raise ValueError(
                f"The sequence has {int(position_ids.max()) + 1} tokens, but the student's context "
                f"is block_size={block_size}.\nShorten the input (or max_new_tokens), or build the "
                "student with a larger block_size."
            )
        return position_ids
