"""The card of an export: the student's own, with how to load this form of it."""

import re
from typing import Final

from distillation.evaluation.safe_text import markdown_line
from distillation.model_card import MARK

_LOADING = re.compile(r"(?<=^## Loading\n\n).*?(?=^## )", re.M | re.S)

_PLAIN: Final = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- knowledge-distillation
- cleangpt-distillation
---

# {name} student

Its run left no card.

## Loading

## Licence

Its weights derive from its teacher's: the teacher's licence applies to them.
"""

_HOW: Final = {
    "gpt2": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generate("Return a list of", max_new_tokens=20)[0]["generated_text"])
```

This is transformers' own GPT-2: no other code is needed. Its logits are the student's, see
`export.json`.

""",
    "gguf": """```bash
llama-cli -m student.gguf -p "Return a list of" -n 20 -no-cnv
```

One file for llama.cpp and what is built on it, tokenizer included. Its logits are the student's,
see `export.json`.

""",
    "onnx": """```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("model.onnx")
inputs = session.get_inputs()
past = [np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs[2:]]
ids = new = np.array([tokenizer("Return a list of").input_ids])
for _ in range(20):  # greedy, with the cache
    values = [new, np.ones_like(ids), *past]
    logits, *past = session.run(None, {i.name: v for i, v in zip(inputs, values)})
    new = logits[:, -1:].argmax(-1)
    ids = np.concatenate([ids, new], 1)
print(tokenizer.decode(ids[0]))
```

Batch, new tokens and past are of any length; keys and values go in and come out. Computed in fp32.
Its logits are the student's, see `export.json`.

""",
}


def exported_card(card: str | None, name: str, form: str) -> str:
    """Return the card of an export.

    Args:
        card: The student's own, if there is one.
        name: What the student is.
        form: "hf", "gpt2", "gguf" or "onnx".
    """
    found = card or _PLAIN.format(name=markdown_line(name))
    # No evaluation comes by here again.
    found = found.replace(f"{MARK}\n", "")
    how = _HOW.get(form)
    return found if how is None else _LOADING.sub(lambda _: how, found, count=1)
