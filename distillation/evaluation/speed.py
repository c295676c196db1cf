"""Size and speed of models, measured side by side.

Timings on a shared machine drift, so models take turns, one run each, and the median of each
model's runs is reported; a slow moment then hits all of them. The first turn warms up and is not
counted.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cleangpt.blocks import BlockStack
from cleangpt.generation import GenerationSettings, generate_ids
from distillation.evaluation.results import SizeResult, SpeedResult

MIN_REPEATS, MAX_REPEATS = 3, 200
FORWARD_TOKENS = 256
DECODE_PROMPT, DECODE_TOKENS = 8, 32


def measure_size(stack: BlockStack) -> SizeResult:
    """Return the stored parameters, each tied tensor once, and the shape."""
    embedding_ids = {id(parameter) for parameter in stack.lm_head.parameters()}
    for module in stack.model.modules():
        if isinstance(module, nn.Embedding):
            embedding_ids.update(id(parameter) for parameter in module.parameters())
    parameters = list(stack.model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    embeddings = sum(p.numel() for p in parameters if id(p) in embedding_ids)
    return SizeResult(
        parameters=total,
        embedding_parameters=embeddings,
        non_embedding_parameters=total - embeddings,
        size_bytes=sum(p.numel() * p.element_size() for p in parameters),
        num_blocks=stack.num_blocks,
        hidden_size=stack.hidden_size,
        vocab_size=stack.vocab_size,
        context_length=stack.context_length,
    )


def measure_speed(
    stacks: Sequence[BlockStack], token_ids: Sequence[int], seq_len: int, budget_seconds: float
) -> list[SpeedResult]:
    """Return forward and decoding speed of each model on the same tokens.

    Args:
        stacks: The models, which take turns.
        token_ids: Text to read; its first tokens are the input.
        seq_len: Context length of the evaluation.
        budget_seconds: Stop after this time, but not before three counted runs of each kind.
    """
    ids = torch.as_tensor(token_ids[: min(seq_len, FORWARD_TOKENS)], dtype=torch.long)[None]
    prompt = ids[0, :DECODE_PROMPT].tolist()
    forward = _take_turns([_forward(stack, ids) for stack in stacks], budget_seconds / 2)
    rooms = [_decode_room(stack, seq_len, len(prompt)) for stack in stacks]
    able = [index for index, room in enumerate(rooms) if room > 0]
    runs = [_decode(stacks[index], prompt, rooms[index]) for index in able]
    decode = dict(zip(able, _take_turns(runs, budget_seconds / 2), strict=True))
    return [
        SpeedResult(
            forward_tokens_per_second=ids.shape[1] / statistics.median(forward[index]),
            decode_tokens_per_second=rooms[index] / statistics.median(decode[index])
            if index in decode
            else None,
            repeats=min(len(forward[index]), len(decode.get(index, forward[index]))),
            peak_memory_bytes=_peak_memory(stack, ids),
        )
        for index, stack in enumerate(stacks)
    ]


def _take_turns(runs: Sequence[Callable[[], None]], budget_seconds: float) -> list[list[float]]:
    """Seconds of every counted run of every model; the first turn warms up."""
    seconds: list[list[float]] = [[] for _ in runs]
    started_at = time.perf_counter()
    for turn in range(MAX_REPEATS + 1):
        for run, own in zip(runs, seconds, strict=True):
            run_started_at = time.perf_counter()
            run()
            own.append(time.perf_counter() - run_started_at)
        if turn == 0:
            for own in seconds:
                own.clear()
        elif turn >= MIN_REPEATS and time.perf_counter() - started_at > budget_seconds:
            break
    return seconds


def _forward(stack: BlockStack, ids: Tensor) -> Callable[[], None]:
    """One forward pass of a window, to the end of what it queues on an accelerator."""
    inputs = ids.to(stack.device)

    @torch.no_grad()
    def run() -> None:
        stack.logits(inputs)
        _wait(stack.device)

    return run


def _decode_room(stack: BlockStack, seq_len: int, prompt_tokens: int) -> int:
    """Tokens to generate; 0 for a model that cannot."""
    if not hasattr(stack.model, "generate"):
        return 0
    context_length = stack.context_length or seq_len + DECODE_TOKENS
    return max(0, min(DECODE_TOKENS, context_length - prompt_tokens))


def _decode(stack: BlockStack, prompt: list[int], room: int) -> Callable[[], None]:
    """One greedy continuation with the cache; without an end token none is shorter."""
    settings = GenerationSettings(max_new_tokens=room)

    def run() -> None:
        generate_ids(stack.model, prompt, settings)
        _wait(stack.device)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak_memory(stack: BlockStack, ids: Tensor) -> int | None:
    """Peak of this model's own device memory in one forward: its weights and what it allocates."""
    if stack.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(stack.device)
    before = torch.cuda.memory_allocated(stack.device)
    _forward(stack, ids)()
    grown = torch.cuda.max_memory_allocated(stack.device) - before
    return grown + measure_size(stack)["size_bytes"]
