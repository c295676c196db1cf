"""How the built-in teacher learns: ordinary language modelling, repeatable and resumable.

Everything random in step n (which windows, which dropout masks) is a function of (seed, n), so a
run that was stopped and continued has the same weights as one that was not. The learning rate warms
up, stays constant and falls linearly to zero over the last part. The text is small and is read many
times, so dropout, weight decay and an average of the weights work against overfitting, and the
average with the lowest validation loss is kept.

This file knows nothing about distillation, and it does not use the project's one training loop: the
base package may not import what is built on it. Read ``train.py`` next.
"""

import copy
import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from cleangpt.builtin.settings import PretrainingSettings
from cleangpt.errors import CheckpointError
from cleangpt.restricted_load import restricted_load

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1


@dataclass
class PretrainingState:
    """What a checkpoint holds: enough to continue with the same bits."""

    model: GPT2LMHeadModel
    average: GPT2LMHeadModel
    optimizers: tuple[torch.optim.Optimizer, ...]
    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    elapsed_seconds: float = 0.0


def initial_state(settings: PretrainingSettings, eos_token_id: int) -> PretrainingState:
    """Return a new GPT-2 with its average and optimizer."""
    torch.manual_seed(settings.seed)
    config = GPT2Config(
        vocab_size=settings.vocab_size,
        n_positions=settings.context_length,
        n_layer=settings.n_layer,
        n_embd=settings.n_embd,
        n_head=settings.n_head,
        # The same function as GPT-2's "gelu_new", in one kernel instead of eight.
        activation_function="gelu_pytorch_tanh",
        embd_pdrop=settings.dropout,
        resid_pdrop=settings.dropout,
        attn_pdrop=0.0,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )
    # At this size attention written out costs a fifth less processor time than the fused kernel.
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    # At equal processor time Muon was ahead of AdamW by 0.4 nats after the first minute. Its steps
    # are scaled to the size of AdamW's, so that one learning rate serves both.
    muon = torch.optim.Muon(
        matrices, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    return PretrainingState(model, average, (muon, adamw))


def learning_rate(step: int, settings: PretrainingSettings) -> float:
    """Return the rate of one step: linear warm-up, constant, linear to zero.

    The constant part does not depend on the number of steps, so a run may be given more or fewer of
    them when it is continued, as long as the fall has not begun.
    """
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    remaining = (settings.steps - step) / max(1.0, settings.cooldown * settings.steps)
    return settings.learning_rate * min(warmup, max(0.0, remaining), 1.0)


def batch_at(
    step: int, stream: Int[Tensor, " tokens"], settings: PretrainingSettings
) -> Int[Tensor, "batch seq"]:
    """Return the windows of one step, cut at random places: a function of (seed, step)."""
    length = min(settings.context_length, stream.numel())
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    starts = torch.randint(
        0, stream.numel() - length + 1, (settings.batch_size, 1), generator=generator
    )
    return stream[starts + torch.arange(length)]


@torch.no_grad()
def mean_loss(
    model: nn.Module, stream: Int[Tensor, " tokens"], context_length: int, stride: int
) -> float:
    """Return the mean negative log-likelihood per token, in nats.

    Windows advance by ``stride``; each token but the first is scored once, in the first window that
    reaches it, so its context is at least ``context_length - stride`` tokens (less at the start).

    Args:
        model: A causal language model, in eval mode.
        stream: Token ids of the whole text.
        context_length: Window length, in tokens.
        stride: Tokens between two windows, 1 to ``context_length - 1``.
    """
    length = min(context_length, stream.numel())
    starts = [*range(0, max(1, stream.numel() - length), stride), stream.numel() - length]
    total, scored_until = 0.0, 1
    for first in range(0, len(starts), 16):
        chunk = torch.tensor(starts[first : first + 16])
        windows = stream[chunk[:, None] + torch.arange(length)]
        logits = model(input_ids=windows).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), windows[:, 1:], reduction="none"
        )
        for row, start in zip(losses, chunk.tolist(), strict=True):
            new = row[max(0, scored_until - start - 1) :]
            total += float(new.sum())
            scored_until = max(scored_until, start + length)
    return total / (stream.numel() - 1)


def train_step(
    state: PretrainingState, stream: Int[Tensor, " tokens"], settings: PretrainingSettings
) -> float:
    """Take one optimizer step, update the average, and return the training loss in nats."""
    rate = learning_rate(state.step, settings)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    ids = batch_at(state.step, stream, settings)
    torch.manual_seed(settings.seed * 1_000_003 + state.step)  # dropout, also after a resume
    state.model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
        logits = state.model(input_ids=ids).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(state.model.parameters(), settings.max_grad_norm)
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    state.step += 1
    # A short memory at first: an average that remembers the random start is of no use.
    decay = min(settings.average_decay, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        for kept, new in zip(state.average.parameters(), state.model.parameters(), strict=True):
            kept.lerp_(new, 1.0 - decay)
    return float(loss.detach())


def train(
    state: PretrainingState,
    settings: PretrainingSettings,
    streams: dict[str, Tensor],
    checkpoint: Path,
    minutes: float = math.inf,
) -> None:
    """Train until the last step or the time limit, validating and saving on the way.

    Args:
        state: A new or loaded state; changed in place.
        settings: The run's settings.
        streams: Token ids of the splits "train" and "validation".
        checkpoint: Where to save.
        minutes: Stop, after saving, when this call has taken as long. 0 trains nothing.
    """
    started_at = time.monotonic()
    before = state.elapsed_seconds
    losses: list[float] = []
    while state.step < settings.steps and time.monotonic() - started_at < 60 * minutes:
        losses.append(train_step(state, streams["train"], settings))
        state.elapsed_seconds = before + time.monotonic() - started_at
        if state.step % settings.eval_every == 0:
            _validate(state, settings, streams["validation"], losses)
            save_checkpoint(state, settings, checkpoint)
            losses.clear()
    if losses:
        _validate(state, settings, streams["validation"], losses)
        save_checkpoint(state, settings, checkpoint)


def _validate(
    state: PretrainingState, settings: PretrainingSettings, stream: Tensor, losses: list[float]
) -> None:
    length = settings.context_length
    loss = mean_loss(state.average, stream, length, length - 1)
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
        state.best_weights = {k: v.clone() for k, v in state.average.state_dict().items()}
    logger.info(
        "step %5d/%d  train loss %.4f  validation loss %.4f  perplexity %.2f  lr %.2e  %.0f s",
        *(state.step, settings.steps, sum(losses) / len(losses), loss, math.exp(loss)),
        *(learning_rate(state.step, settings), state.elapsed_seconds),
    )


def save_checkpoint(state: PretrainingState, settings: PretrainingSettings, path: Path) -> None:
    """Write the state to ``path`` in one move, so a kill leaves the old file or the new one."""
    content = {
        "model": state.model.state_dict(),
        "average": state.average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "best_weights": state.best_weights,
        "progress": json.dumps(
            {
                "format": CHECKPOINT_FORMAT,
                "settings": asdict(settings),
                "step": state.step,
                "best_loss": state.best_loss,
                "best_step": state.best_step,
                "elapsed_seconds": state.elapsed_seconds,
            }
        ),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(state: PretrainingState, settings: PretrainingSettings, path: Path) -> None:
    """Fill ``state`` from ``path``.

    ``steps`` alone may differ, and ``eval_every``, which changes no weight.

    Raises:
        CheckpointError: If the file is damaged or was written with other settings.
    """
    try:
        content: dict[str, Any] = restricted_load(path)
        progress = json.loads(content["progress"])
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint of this command ({type(error).__name__}).",
            "Name another --output_dir, or delete the file to start again.",
        ) from error
    free = {"steps", "eval_every"}
    stored, ours = progress["settings"], asdict(settings)
    differing = [k for k in ours if k not in free and stored.get(k) != ours[k]]
    if differing or progress["format"] != CHECKPOINT_FORMAT:
        listed = ", ".join(f"{k} {stored.get(k)} -> {ours[k]}" for k in differing) or "its format"
        raise CheckpointError(
            f"{path} was written with other settings: {listed}.",
            "Use the same flags as before, or name another --output_dir.",
        )
    state.model.load_state_dict(content["model"])
    state.average.load_state_dict(content["average"])
    for optimizer, stored_state in zip(state.optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(stored_state)
    state.best_weights = content["best_weights"]
    state.step, state.best_step = progress["step"], progress["best_step"]
    state.best_loss, state.elapsed_seconds = progress["best_loss"], progress["elapsed_seconds"]
