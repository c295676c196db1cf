"""What models make of text they write themselves.

Perplexity scores a model on text that people wrote, one token ahead. Used to write, it reads its
own tokens, where errors may add up, and it may go round in circles: two students of one perplexity
can differ there. Each model continues the same beginnings by sampling from its own distribution;
then both it and the teacher read the result, and are compared token by token as they are on the
text itself. A greedy continuation besides tells how much it repeats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cleangpt.blocks import BlockStack
from cleangpt.generation import GenerationSettings, continue_rows
from distillation.evaluation.results import OwnText, OwnTextResult

WINDOWS = 16
PROMPT_TOKENS, NEW_TOKENS = 32, 96
GRAM = 4
QUARTERS = 4


def measure_own_text(
    stacks: Mapping[str, BlockStack],
    teacher: BlockStack,
    ids: Sequence[int],
    *,
    seq_len: int,
    seed: int,
) -> OwnTextResult | None:
    """Let every model continue beginnings of the text, and compare it with the teacher there.

    Args:
        stacks: The models by name; all can generate, and give finite scores.
        teacher: Whose divergence from them counts.
        ids: The text, at most so much of it that windows do not overlap.
        seq_len: Context length of the evaluation; beginning and continuation fit into it.
        seed: Of the sampling, the same for every model.

    Returns:
        The figures; None where the context or the text has no room for them.
    """
    prompt = min(PROMPT_TOKENS, seq_len // QUARTERS)
    new = min(NEW_TOKENS, seq_len - prompt) // QUARTERS * QUARTERS
    count = min(WINDOWS, len(ids) // max(1, prompt + new))
    if min(prompt, count) < 1 or new < GRAM:
        return None
    starts = [index * (len(ids) // count) for index in range(count)]
    text = torch.tensor([list(ids[start : start + prompt + new]) for start in starts])
    settings = GenerationSettings(max_new_tokens=new, temperature=1.0, top_k=0, seed=seed)
    _, loss = _compared(teacher, teacher, text, prompt)
    return OwnTextResult(
        num_windows=count,
        prompt_tokens=prompt,
        new_tokens=new,
        text_loss_nats=float(loss.mean()),
        text_repetition=repetition(text[:, prompt:]),
        models=[_of_model(name, stack, teacher, text, settings) for name, stack in stacks.items()],
    )


def _of_model(
    name: str, stack: BlockStack, teacher: BlockStack, text: Tensor, settings: GenerationSettings
) -> OwnText:
    prompt = text.shape[1] - settings.max_new_tokens
    on_text, _ = _compared(stack, teacher, text, prompt)
    unknown = range(teacher.vocab_size, stack.vocab_size)  # to the teacher, who is to read them
    sampled, greedy = (
        continue_rows(stack.model, text[:, :prompt], how, never=unknown)
        for how in (replace(settings, do_sample=True), settings)
    )
    kl, loss = _compared(stack, teacher, sampled, prompt)
    return OwnText(
        name=name,
        kl_text_nats=float(on_text.mean()),
        kl_text_quarters=_quarters(on_text),
        kl_nats=float(kl.mean()),
        kl_quarters=_quarters(kl),
        teacher_loss_nats=float(loss.mean()),
        repetition=repetition(greedy[:, prompt:]),
    )


def _quarters(kl: Float[Tensor, "rows new"]) -> list[float]:
    return [float(part.mean()) for part in kl.chunk(QUARTERS, dim=1)]


@torch.no_grad()
def _compared(
    stack: BlockStack, teacher: BlockStack, rows: Int[Tensor, "rows seq"], prompt: int
) -> tuple[Float[Tensor, "rows new"], Float[Tensor, "rows new"]]:
    """KL(teacher || model) and the teacher's loss at every token after the beginning, in nats."""
    divergences, losses = [], []
    for row in rows.split(1):  # the scores of more would not fit for large vocabularies
        theirs = _log_probabilities(teacher, row, prompt)
        own = theirs if stack is teacher else _log_probabilities(stack, row, prompt)
        losses.append(-theirs.gather(1, row[0, prompt:, None])[:, 0])
        shared = min(own.shape[1], theirs.shape[1])
        theirs, own = (part[:, :shared].log_softmax(-1) for part in (theirs, own))
        divergences.append((theirs.exp() * (theirs - own)).sum(-1))
    return torch.stack(divergences), torch.stack(losses)


def _log_probabilities(
    stack: BlockStack, row: Int[Tensor, "1 seq"], prompt: int
) -> Float[Tensor, "new vocab"]:
    """Of the tokens after the beginning, on the host."""
    logits = stack.logits(row.to(stack.device))[0, prompt - 1 : -1]
    return logits.float().cpu().log_softmax(-1)


def repetition(rows: Int[Tensor, "rows seq"], gram: int = GRAM) -> float:
    """The share of a row's n-grams that repeat an earlier one, mean over the rows.

    ``1 - different n-grams / n-grams``: seq-rep-n of Welleck et al. 2020, arXiv:1908.04319.

    Args:
        rows: Token ids, at least ``gram`` of them in a row.
        gram: n.

    Example:
        >>> repetition(torch.tensor([[1, 2, 1, 2, 1]]), gram=2)
        0.5
    """
    shares = []
    for row in rows.tolist():
        grams = [tuple(row[i : i + gram]) for i in range(len(row) - gram + 1)]
        shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares)
