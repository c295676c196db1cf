"""One process of a measured run: trains a random student on a random teacher and counts.

    python -m benchmarks.scaling_worker '{"shape": {...}, "folder": "..."}'

alone or under torchrun; process 0 prints what it counted as one line of JSON. ``scaling.py`` starts
it: several processes, each with a state of its own, cannot be measured from one.
"""

import contextlib
import ctypes
import gc
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.cases import Shape, new_student, new_teacher, windows_loader
from benchmarks.memory import MIB, forget_peak, peak_mib
from benchmarks.rates import Meter, Rates
from cleangpt.blocks import BlockStack
from cleangpt.runtime.ranks import join
from cleangpt.sharding import shard_blocks
from distillation import DistillationTrainer

LR = 1e-3


@dataclass(frozen=True)
class Task:
    """What a worker trains.

    Args:
        shape: Sizes of models and data.
        folder: Where the run's directory goes; the same for all processes.
        kind: Kind of student.
        shards: Whether the teacher is spread over the processes.
        polish_epochs: Epochs of the whole student, at the end.
        options: Settings of the trainer.
    """

    shape: Shape
    folder: str
    kind: str = "Vanilla"
    shards: bool = False
    polish_epochs: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Counts:
    """What one process saw in a run; bytes and seconds.

    Args:
        seconds: Of all stages.
        training: Gradients and optimizer states, by stage.
        states: Kept states, at most.
        disk: Files of states of this process, at most.
        output: What the run left.
        reduced: Messages summed over all processes.
        gathered: Blocks of the teacher that were gathered, whole.
        audit: Sums of the audit of the teacher.
        fit: Sums of the stitches' regressions at the end.
        peak: Memory above that of the process without models, at most.
        rates: What it computes, moves and sends per second.
    """

    seconds: float = 0.0
    training: list[int] = field(default_factory=list)
    states: int = 0
    disk: int = 0
    output: int = 0
    reduced: int = 0
    gathered: int = 0
    audit: int = 0
    fit: int = 0
    peak: float = 0.0
    rates: Rates | None = None


def run(task: Task) -> Counts:
    """Train, and count."""
    torch.set_num_threads(1)
    ranks = join("cpu")
    counts = Counts()
    warm_up(task)
    meter = Meter(ranks, task.shape, task.kind)
    gc.collect()
    before = psutil.Process().memory_info().rss / MIB
    teacher, student = new_teacher(task.shape), new_student(task.kind, task.shape)
    shards = shard_blocks(teacher, torch.device("cpu")) if task.shards else None
    block = sum(parameter.nbytes for parameter in BlockStack(teacher).block(0).parameters())
    measure_all(meter, shards, block)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # give back what making the models took
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    trainer = new_trainer(task, teacher, student)
    gathers = 0 if shards is None else shards.gathers
    count_sums(counts, meter)
    watch(trainer, counts)
    watch_sums(counts)
    for own in (trainer.backbone_trainer, trainer.head_trainer, trainer.polish_trainer):
        measure_after_stages(own, meter)
    results = train(trainer, task)
    rows = [*results["blocks"], results["head"], results["polish"]]
    counts.seconds = sum(row["seconds"] for row in rows if row)
    counts.peak = (peak_mib("cpu") - before) * MIB
    counts.output = folder_bytes(trainer.run.path)
    if shards is not None:
        counts.gathered = (shards.gathers - gathers) * block
    measure_all(meter, shards, block)
    counts.rates = meter.rates()
    return counts


def measure_all(meter: Meter, shards: Any, block_bytes: int) -> None:
    """Take all rates that a run has, of a teacher that is whole (``shards`` is None) or spread."""
    meter.measure()
    if shards is not None:
        meter.measure_gathering(shards, block_bytes)


def new_trainer(task: Task, teacher: Any, student: Any) -> DistillationTrainer:
    """The library's trainer, exact and without what a plan does not count."""
    return DistillationTrainer(
        *(teacher, student, None, windows_loader(task.shape)),
        output_dir=Path(task.folder) / "run",
        precision="fp32",
        checkpoint_minutes=0.0,
        **{"audit_tokens": 0, **task.options},
    )


def train(trainer: DistillationTrainer, task: Task) -> dict[str, Any]:
    """All blocks, one epoch of the head, and the polish."""
    return trainer.train(
        *(task.shape.epochs, LR),
        lm_head_epochs=1,
        lm_head_lr=LR,
        initialize_head_from_teacher=False,
        polish_epochs=task.polish_epochs,
        polish_lr=LR,
    )


def warm_up(task: Task) -> None:
    """Train next to nothing once: what is imported and allocated for good is no run's memory."""
    small = Shape(
        blocks=2,
        teacher_width=64,
        student_width=32,
        student_heads=2,
        vocab=64,
        batch_size=2,
        seq_len=8,
        batches=2,
        epochs=1,
    )
    own = replace(task, shape=small, folder=str(Path(task.folder) / "warm-up"))
    teacher, student = new_teacher(small), new_student(task.kind, small)
    if task.shards:
        shard_blocks(teacher, torch.device("cpu"))
    train(new_trainer(own, teacher, student), own)


def measure_after_stages(trainer: Any, meter: Meter) -> None:
    """Take the rates after each stage of a trainer."""
    together = trainer.train_together

    def measured(*args: Any) -> Any:
        results = together(*args)
        meter.measure()
        return results

    trainer.train_together = measured


def count_sums(counts: Counts, meter: Meter) -> None:
    """Count the bytes of every message that is summed from here on, but for the meter's."""
    reduce: Any = distributed.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.reduced += 0 if meter.measures else tensor.nbytes
        return reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counted


def watch_sums(counts: Counts) -> None:
    """Look at the float64 matrices whenever a model tells the states of all its levels.

    The audit asks for those before any stage; fits of all stitches, and what is told of a chain of
    blocks, after them.
    """
    states_of = BlockStack.block_hidden_states

    def looked_at(self: BlockStack, *args: Any, **kwargs: Any) -> Any:
        of = "fit" if counts.training else "audit"
        setattr(counts, of, max(getattr(counts, of), double_bytes()))
        return states_of(self, *args, **kwargs)

    BlockStack.block_hidden_states = looked_at  # type: ignore[method-assign]


def double_bytes() -> int:
    """What all matrices of float64 take."""
    found = [each for each in gc.get_objects() if type(each) is Tensor and each.ndim > 1]
    return sum(tensor.nbytes for tensor in found if tensor.dtype == torch.float64)


def watch(trainer: DistillationTrainer, counts: Counts) -> None:
    """Look at memory and disk after every optimizer step."""
    activations, ranks = trainer.backbone_trainer.activations, trainer.backbone_trainer.ranks
    folder = trainer.run.path / "activations"
    if ranks.count > 1:
        folder = folder / f"rank-{ranks.index}"
    seen: list[Any] = []

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not seen or seen[-1] is not optimizer:
            seen.append(optimizer)
            counts.training.append(0)
        counts.training[-1] = max(counts.training[-1], training_bytes(optimizer))
        counts.states = max(counts.states, activations.bytes_kept)
        counts.disk = max(counts.disk, folder_bytes(folder))

    register_optimizer_step_post_hook(look)


def training_bytes(optimizer: Any) -> int:
    """Gradients and the optimizer's own tensors, scalars left out."""
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    held = [p.grad for p in learning if p.grad is not None]
    held += [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    ]
    return sum(tensor.nbytes for tensor in held)


def folder_bytes(folder: Path) -> int:
    """The size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Run the task of the command line."""
    raw = json.loads(sys.argv[1])
    task = Task(**{**raw, "shape": Shape(**raw["shape"])})
    counts = run(task)
    if join("cpu").is_main:
        print(json.dumps(asdict(counts)), flush=True)
    if distributed.is_initialized():
        distributed.barrier()  # process 0 may still be writing
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
