"""Turn a training state into the folder that is shipped: fp16 weights, tokenizer and model card.

The figures on the card are measured on the written files, after rounding to fp16, so they are what
a user gets. Weights are stored in half the bytes and loaded in float32, as ``config.json`` says.
"""

import math
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cleangpt.builtin.corpus import builtin_texts, corpus_fingerprint
from cleangpt.builtin.pretraining import PretrainingState, mean_loss
from cleangpt.builtin.settings import PretrainingSettings
from cleangpt.structure import count_parameters

PROMPT: Final = "Return a list of"

CARD: Final = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# The built-in teacher

A GPT-2 ({n_layer} blocks x {n_embd}, {n_head} heads, context {context_length}, {vocab_size} tokens,
{parameters:,} parameters, tied head) that knows one thing: the English of Python's own
documentation. It exists so that a distillation can run anywhere, offline, against a teacher that
has learnt something. Its name as a teacher is `builtin`.

## Figures

| split | documents | tokens | perplexity | bits per byte |
|---|---|---|---|---|
{rows}

Perplexity is token-weighted, in this model's own tokens, over windows of {context_length} tokens
that advance by {stride}; documents are packed with `<|endoftext|>` between them, which is scored
as well. Bits per byte divide the same sum by the bytes of the text. Measured on these files
(weights rounded to fp16, computed in float32); before the rounding the test perplexity was
{unrounded:.2f}. Guessing each token by its frequency in the training text has test perplexity
{unigram:.0f}.

## Text

The topics of `help()` (`pydoc_data.topics`) and the docstrings of the standard library, gathered
by `cleangpt.builtin.builtin_texts`; split by document about 90 : 5 : 5; repeated and nearly
repeated paragraphs are kept once over all splits. No text is stored here. The text follows the
Python version: these figures belong to CPython {python} on {system}, whose text has SHA-256
`{fingerprint}`.
Under another version the perplexity differs, and some of its test text may have been training
text of this one, where a module was renamed.

## Training

`python -m cleangpt.builtin.train --output_dir runs/builtin_teacher{flags}`

From scratch, {step:,} of {steps:,} steps of {batch_size} windows ({epochs:.1f} passes over the
text) in {minutes:.0f} minutes on two CPU cores that other work shared. Muon for the matrices of
the blocks and AdamW for the rest, peak learning rate {learning_rate:g}: linear warm-up over
{warmup_steps} steps, constant, linear to zero over the last {cooldown:.0%}. Weight decay
{weight_decay:g}, dropout {dropout:g}, exponential average of the weights ({average_decay:g}), taken
where the validation loss was lowest (step {best_step:,}). Seed {seed}. The tokenizer is a
byte-level BPE learnt from the training split.

## Sample

Prompt "{prompt}", sampled with temperature 0.7 and seed 0:

```
{sample}
```

## Limits

It writes fluent docstrings that are often untrue, and knows nothing else: no facts, no other
language, no instructions, no conversation. It is a teacher for trying and testing distillation,
not a model to use. Its training text is documentation; it was not examined for bias or harm.

## Licence

The weights, the tokenizer and the code that made them: Apache-2.0. The text is part of CPython, is
under the Python Software Foundation License, and is read from the user's own installation.
"""


@dataclass(frozen=True)
class Figure:
    """What was measured on one split.

    Args:
        documents: Documents in the split.
        tokens: Scored tokens.
        perplexity: exp of the mean negative log-likelihood per token.
        bits_per_byte: The same sum in bits, over the UTF-8 bytes of the text.
    """

    documents: int
    tokens: int
    perplexity: float
    bits_per_byte: float


def export_teacher(
    state: PretrainingState,
    settings: PretrainingSettings,
    tokenizer: PreTrainedTokenizerFast,
    streams: dict[str, Tensor],
    folder: Path,
) -> Path:
    """Write the best weights of ``state`` as a model folder with a card, and return the folder."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state.average.load_state_dict(state.best_weights or state.average.state_dict())
    unrounded = math.exp(_mean_loss(state.average, streams["test"], settings))
    _save_half_precision(state.average, temporary)
    tokenizer.save_pretrained(temporary)

    model = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32).eval()
    figures = {
        split: measure(model, streams[split], split, settings) for split in ("validation", "test")
    }
    card = CARD.format(
        **asdict(settings),
        **_circumstances(state, settings, streams),
        parameters=count_parameters(model),
        rows="\n".join(_row(split, figure) for split, figure in figures.items()),
        stride=settings.context_length // 2,
        unrounded=unrounded,
        prompt=PROMPT,
        sample=_sample(model, AutoTokenizer.from_pretrained(temporary)),
    )
    (temporary / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return folder


def measure(model: Any, stream: Tensor, split: str, settings: PretrainingSettings) -> Figure:
    """Return the figures of one split, for a model in eval mode."""
    texts = builtin_texts(split)
    loss = _mean_loss(model, stream, settings)
    tokens = stream.numel() - 1
    text_bytes = sum(len(text.encode()) for text in texts)
    return Figure(len(texts), tokens, math.exp(loss), loss * tokens / math.log(2) / text_bytes)


def _mean_loss(model: Any, stream: Tensor, settings: PretrainingSettings) -> float:
    return mean_loss(model, stream, settings.context_length, settings.context_length // 2)


def _save_half_precision(model: Any, folder: Path) -> None:
    # The head is the token embedding and is tied to it again on loading: stored once.
    half = {k: v.half() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    # The configuration keeps dtype float32: loading without a dtype then computes in float32.
    model.config.dtype = "float32"
    model.save_pretrained(folder, state_dict=half)
    (folder / "model.safetensors").chmod(0o644)


def _row(split: str, figure: Figure) -> str:
    return (
        f"| {split} | {figure.documents} | {figure.tokens:,} | {figure.perplexity:.2f} "
        f"| {figure.bits_per_byte:.3f} |"
    )


def _circumstances(
    state: PretrainingState, settings: PretrainingSettings, streams: dict[str, Tensor]
) -> dict[str, Any]:
    tokens_seen = state.step * settings.batch_size * settings.context_length
    counts = torch.bincount(streams["train"], minlength=settings.vocab_size).float() + 1.0
    log_frequency = (counts / counts.sum()).log()
    return {
        "step": state.step,
        "best_step": state.best_step,
        "flags": _flags(settings),
        "epochs": tokens_seen / streams["train"].numel(),
        "minutes": state.elapsed_seconds / 60,
        "unigram": math.exp(-float(log_frequency[streams["test"]].mean())),
        "python": platform.python_version(),
        "system": platform.system(),
        "fingerprint": corpus_fingerprint(),
    }


def _flags(settings: PretrainingSettings) -> str:
    """Return the flags that repeat the run: those whose value is not the default."""
    default = asdict(PretrainingSettings())
    changed = {k: v for k, v in asdict(settings).items() if v != default[k]}
    no_bf16 = "" if changed.pop("bf16", True) else " --no_bf16"
    return "".join(f" --{name} {value}" for name, value in changed.items()) + no_bf16


def _sample(model: Any, tokenizer: Any) -> str:
    torch.manual_seed(0)
    ids = tokenizer(tokenizer.eos_token + PROMPT, return_tensors="pt")
    room = model.config.n_positions - ids["input_ids"].shape[1]
    output = model.generate(
        **ids,
        do_sample=True,
        temperature=0.7,
        max_new_tokens=min(120, room),
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(output[0], skip_special_tokens=True).replace("```", "'''")
    # The card is ASCII like every file of the project; a byte-level model may say half a character.
    return "\n".join(
        line.rstrip() for line in text.encode("ascii", "replace").decode().splitlines()
    )
