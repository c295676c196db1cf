"""Out of memory, in two lines: what the run had planned to need, and which flag saves how much."""

from dataclasses import replace

from cleangpt.blocks import BlockStack
from cleangpt.errors import OutOfMemory
from distillation.cache_plan import shown_bytes
from distillation.plan import memory_parts
from distillation.workload import Workload


def memory_advice(
    said: str, teacher: BlockStack, student: BlockStack, work: Workload, kept_bytes: int
) -> OutOfMemory:
    """The error, with the same numbers as the plan's.

    Args:
        said: What the allocator said.
        teacher: The teacher.
        student: The student.
        work: What is trained on.
        kept_bytes: Bytes of frozen states that were to lie in memory.
    """
    parts = memory_parts(teacher, student, work, kept_bytes)
    total = sum(parts.values())

    def way(flag: str, less: Workload, kept: int, note: str = "") -> tuple[int, str]:
        saved = total - sum(memory_parts(teacher, student, less, kept).values())
        return saved, f"{flag} saves {shown_bytes(saved)}{note}"

    ways = []
    if work.batch_size > 1:
        half = work.batch_size // 2
        less = replace(work, batch_size=half)
        ways.append(way(f"--batch_size {half}", less, kept_bytes))
    if work.seq_len > 1:
        half = work.seq_len // 2
        ways.append(way(f"--block_size {half}", replace(work, seq_len=half), kept_bytes))
    if kept_bytes:
        note = " and goes on with --resume"
        ways.append(way("--activation_cache disk", work, 0, note))
    ways.sort(reverse=True)
    listed = "; ".join(f"{shown_bytes(size)} {name}" for name, size in parts.items() if size)
    smaller = "a smaller student (--student_n_embd) needs less of everything"
    return OutOfMemory(
        f"Memory ran out ({said}). Planned at the peak: {shown_bytes(total)} ({listed}).",
        f"{', '.join([*(text for _, text in ways), smaller])}.",
    )
