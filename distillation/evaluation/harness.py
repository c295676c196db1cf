"""EleutherAI's harness on teacher and student, and our own perplexity on the same windows.

The harness scores each document alone, every token once, the first given the token that begins a
text. Its windows lie side by side, but for the last, which reaches back so that it is full. With
that token put before a document and ``stride`` equal to the context length, ``scoring_windows.py``
has the same windows, so the two must agree: ``own_perplexity`` says how well. The evaluation itself
packs documents into one stream and strides by half a window, so that its perplexity is another
number, mostly a lower one.
"""

import difflib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError, UsageError
from distillation.evaluation.metrics import score_models
from distillation.evaluation.scoring_windows import plan_windows, window_batches

OUR_TASKS: Final = Path(__file__).with_name("lm_eval_tasks")
TEXT_TASK: Final = "cleangpt_text"
OUR_NAMES: Final = (TEXT_TASK, "cleangpt_cloze")


@dataclass(frozen=True)
class Asked:
    """What the harness is asked.

    Args:
        tasks: Names of tasks or groups.
        context: Tokens that every model reads at most.
        batch_size: Requests per forward pass.
        num_fewshot: Examples before each question; None as the task says.
        limit: Documents per task; None for all.
        include_path: A folder with more tasks.
    """

    tasks: Sequence[str]
    context: int
    batch_size: int
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: Path | None = None


def task_manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """Return what finds the tasks; the harness's own are looked through only if they are needed.

    Raises:
        UsageError: If a task is unknown.
    """
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in (OUR_TASKS, include_path) if folder is not None]
    only_ours = all(task in OUR_NAMES for task in tasks)
    manager = TaskManager(include_path=folders, include_defaults=not only_ours)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            raise UsageError(
                f"--tasks: lm_eval knows no task {task!r}.",
                f"Did you mean {near[0]}? " * bool(near) + "lm_eval ls tasks lists all.",
            )
    return manager


def ask(model: Any, tokenizer: Any, asked: Asked, manager: Any) -> dict[str, Any]:
    """Return what the harness finds for one model, its samples included.

    Raises:
        InputError: If a task cannot be made, such as one whose data cannot be reached.
    """
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant so
    try:
        found = simple_evaluate(
            model=_harness_model(model, tokenizer, asked),
            tasks=list(asked.tasks),
            num_fewshot=asked.num_fewshot,
            limit=asked.limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=manager,
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise InputError(
            f"lm_eval could not run {', '.join(asked.tasks)}: {error}",
            "A task whose data are on a hub needs the network once; ours need none.",
        ) from error
    return dict(found or {})


def _harness_model(model: Any, tokenizer: Any, asked: Asked) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=asked.context,
        batch_size=asked.batch_size,
        # The token before a text is put there by the harness, once.
        add_bos_token=False,
    )


def scores_of(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return task to metric to value, without standard errors and names."""
    return {
        task: {
            name.partition(",")[0]: float(value)
            for name, value in values.items()
            if "," in name and "_stderr" not in name and isinstance(value, int | float)
        }
        for task, values in found.get("results", {}).items()
    }


@dataclass(frozen=True)
class Perplexities:
    """Per-token perplexity of one text by two programs.

    Args:
        harness: By the harness.
        own: By the code of our evaluation, on the same windows.
        num_tokens: Tokens scored.
    """

    harness: float
    own: float
    num_tokens: int

    @property
    def relative_difference(self) -> float:
        """How far they are apart, as a share of ours."""
        return abs(self.harness / self.own - 1)


def own_perplexity(
    model: Any, tokenizer: Any, asked: Asked, found: dict[str, Any]
) -> Perplexities | None:
    """Compute the perplexity that the harness has found for our text; None if it was not asked."""
    samples = found.get("samples", {}).get(TEXT_TASK)
    if not samples:
        return None
    stack, loss, count, num_bytes = BlockStack(model), 0.0, 0, 0
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    for sample in samples:
        text = str(sample["doc"]["text"])
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        windows = plan_windows(len(ids) + 1, asked.context, asked.context)
        batches = window_batches([prefix, *ids], windows, asked.batch_size)
        (sums,) = score_models([stack], stack, batches)
        loss, count = loss + sums.loss, count + sums.num_tokens
        num_bytes += len(text.encode("utf-8", "replace"))
    per_byte = scores_of(found)[TEXT_TASK]["byte_perplexity"]
    return Perplexities(
        harness=_exp(math.log(per_byte) * num_bytes / count),
        own=_exp(loss / count),
        num_tokens=count,
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def shared_context(models: Sequence[torch.nn.Module], asked: int | None) -> int:
    """Return the longest context that all models read, or the shorter one that is asked for."""
    lengths = [BlockStack(model).context_length for model in models]
    known = [length for length in (*lengths, asked) if length is not None]
    return min(known) if known else 1024
