"""The embedded default: a text, a tokenizer and a small trained teacher, all usable offline.

``builtin_texts(split)`` gathers the text, ``builtin_teacher_path()`` is a folder that
``transformers`` loads, and ``python -m cleangpt.builtin.train`` is the command that made it.
Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

from cleangpt.builtin.corpus import builtin_texts

__all__ = ["builtin_teacher_path", "builtin_texts"]


def builtin_teacher_path() -> Path:
    """Return the folder of the built-in teacher: weights in fp16, tokenizer and model card."""
    return Path(__file__).resolve().parent / "assets"
