"""What the quality study trains and judges on: teachers, windows of text, judges."""

from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.quality_plan import BUDGETS, REAL_BUDGETS, SEQ_LEN, SHORTENED, Run
from benchmarks.quality_runs import Judge, run_arm
from cleangpt.data import TextDataset, load_texts
from cleangpt.generation import GenerationSettings, generate_ids
from cleangpt.teacher import load_teacher

ALL_BUDGETS = {**BUDGETS, **SHORTENED, **REAL_BUDGETS}
REAL_TEST_WINDOWS = 96
REAL_BATCH = 4
"""Windows: twice the steps of 8 for the same operations."""
HELD_OUT_WINDOWS = 64
PROMPTS = ("The history of the city began", "She opened the door and", "To make bread, you need")
NEW_TOKENS = 40


def perform(run: Run, split: str, other_text: Path | None = None) -> dict[str, Any]:
    """Train and judge one student.

    Args:
        run: What.
        split: Part of the built-in text that decides.
        other_text: A file to judge on besides; None has none.
    """
    measures = []
    if run.teacher != "builtin":
        measures.append(lambda student: {"samples": samples(run.teacher, student)})
        if other_text is not None:
            other = judge_of(run.teacher, str(other_text))
            measures.append(lambda student: {f"other_{k}": v for k, v in other(student).items()})
    record = run_arm(
        run.arm,
        teacher=teacher_named(run.teacher).model,
        windows=windows_of(run.teacher, "builtin", "train"),
        judges=[judge_of(run.teacher, "builtin", split), *measures],
        kind=run.kind,
        shape=run.shape,
        budget=ALL_BUDGETS[run.budget],
        seed=run.seed,
        batch_size=8 if run.teacher == "builtin" else REAL_BATCH,
        held_out=windows_of(run.teacher, "builtin", "validation")[:HELD_OUT_WINDOWS],
    )
    return record | {"budget_name": run.budget, "teacher": run.teacher}


@cache
def teacher_named(name: str) -> Any:
    """A teacher and its tokenizer."""
    return load_teacher(name)


@cache
def windows_of(teacher: str, text: str, split: str) -> Any:
    """All full windows of a part of a text in a teacher's tokens, [windows, seq]."""
    texts = load_texts(text, split=split).texts
    tokens = TextDataset(texts, teacher_named(teacher).tokenizer, SEQ_LEN).tokens
    return tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)


@cache
def judge_of(teacher: str, text: str, split: str = "train") -> Judge:
    """Judges by a part of a text, the first windows of it where the teacher is a large one."""
    windows = windows_of(teacher, text, split)
    if teacher == "builtin":
        return Judge(teacher_named(teacher).model, windows)
    return Judge(teacher_named(teacher).model, windows[:REAL_TEST_WINDOWS], keep=False)


def samples(teacher: str, student: Any) -> dict[str, str]:
    """Greedy continuations of a few prompts."""
    tokenizer = teacher_named(teacher).tokenizer
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS)
    found = {}
    for prompt in PROMPTS:
        ids = generate_ids(student, tokenizer(prompt)["input_ids"], settings)
        found[prompt] = tokenizer.decode(ids)
    return found
