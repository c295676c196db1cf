"""Memory, devices and worker processes (M01 to M05 and P11 of docs/faults.md)."""

import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from cleangpt.cli import run_command
from cleangpt.data import batches as loading
from cleangpt.data.batches import make_dataloader
from cleangpt.data.windows import DistillationDataCollator, TextDataset
from cleangpt.errors import OutOfMemory, UsageError
from cleangpt.runtime.device import resolve_device
from tests.builders import tiny_student, tiny_teacher
from tests.byte_tokenizer import make_tokenizer
from tests.faults.small_runs import TRAINING, limited, newest_checkpoint, small_trainer

TEXTS = [f"The quick brown fox number {i} jumps over the lazy dog." for i in range(12)]


def loader(batch_size: int = 8) -> Any:
    tokenizer = make_tokenizer(eos_token="<end>")
    windows = TextDataset(TEXTS, tokenizer, 16)
    return make_dataloader(windows, DistillationDataCollator(tokenizer, 16), batch_size)


def trainer(folder: Path, **options: Any) -> Any:
    models = {"teacher": tiny_teacher(vocab_size=258), "student": tiny_student(vocab_size=258)}
    return small_trainer(folder, data=loader(), **models, **options)


def test_memory_that_runs_out_says_what_was_planned_and_what_saves_how_much(
    tmp_path: Path,
) -> None:
    own = trainer(tmp_path)
    plan = own.plan(1, polish_epochs=1)
    in_use = psutil.Process().memory_info().vms

    def too_large(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        with limited(resource.RLIMIT_AS, in_use + 2**26):
            return student.sum() + torch.empty(2**28).sum()

    own.backbone_trainer.hidden_state_loss_fn = too_large
    with pytest.raises(OutOfMemory) as error:
        own.train(**TRAINING)
    assert error.value.exit_code == 7
    cause, remedy = str(error.value).splitlines()
    assert re.search(r"Memory ran out \(.*(allocate|[Mm]emory).*\)\. Planned at the peak: ", cause)
    for part in ("both models", "kept states", "of the stage in training"):
        assert part in cause
    peak = re.search(r"peak: ([\d.]+) (MB|kB)", cause)
    assert peak is not None
    unit = {"kB": 1e3, "MB": 1e6}[peak[2]]
    assert float(peak[1]) * unit == pytest.approx(plan.memory_bytes, rel=0.01)
    assert re.search(r"--batch_size 4 saves [\d.]+ [kM]B", remedy)
    assert re.search(r"--block_size 8 saves [\d.]+ [kM]B", remedy)
    assert re.search(r"--activation_cache disk saves [\d.]+ kB and goes on with --resume", remedy)


@pytest.mark.slow
def test_a_gpu_that_runs_out_saves_no_half_step(tmp_path: Path) -> None:
    def run_out() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    own = trainer(tmp_path, what=run_out, at_step=11, checkpoint_steps=5)
    with pytest.raises(OutOfMemory, match=r"CUDA out of memory.*\n.*--batch_size 4"):
        own.train(**TRAINING)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state["steps"] < 11
    trainer(tmp_path, checkpoint_steps=5).train(**TRAINING)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for name in ("mps", "cuda", "cuda:7"):
        if torch.device(name).type in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            continue
        with pytest.raises(UsageError, match="this machine offers: .*cpu") as error:
            resolve_device(name)
        assert error.value.exit_code == 2
    if not torch.backends.mps.is_available():
        with pytest.raises(UsageError, match="'mps' was asked for"):
            small_trainer(tmp_path, device=torch.device("mps"))


class Hanging(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        time.sleep(100 if index == 2 else 0)
        return {"input_ids": [1, 2]}


@pytest.mark.slow
def test_a_worker_that_hangs_ends_in_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "WORKER_SECONDS", 0.5)
    collator = DistillationDataCollator(make_tokenizer(eos_token="<end>"), 4)
    hanging = make_dataloader(Hanging(), collator, 1, shuffle=False, num_workers=1)
    assert run_command(lambda argv: list(hanging), []) == 5
    shown = capsys.readouterr().err
    assert "a process that prepares batches does not answer" in shown
    assert "--num_workers 0" in shown
    assert not multiprocessing.active_children()


WORKERS = """
import multiprocessing, sys
from tests.faults.test_memory_and_devices import TEXTS, make_tokenizer
from cleangpt.data.batches import make_dataloader
from cleangpt.data.windows import DistillationDataCollator, TextDataset

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    tokenizer = make_tokenizer(eos_token="<end>")
    tokenizer(TEXTS)
    windows = TextDataset(TEXTS, tokenizer, 16)
    collator = DistillationDataCollator(tokenizer, 16)
    loaders = [make_dataloader(windows, collator, 4, num_workers=n) for n in (0, 2)]
    seen = [[batch["input_ids"].sum().item() for batch in loader] for loader in loaders]
    print(seen[0] == seen[1], len(seen[0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_every_kind_come_to_an_end_in_silence(method: str, tmp_path: Path) -> None:
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    here = {**os.environ, "PYTHONPATH": str(Path.cwd()), "TOKENIZERS_PARALLELISM": ""}
    del here["TOKENIZERS_PARALLELISM"]
    done = subprocess.run(
        [sys.executable, str(script), method], capture_output=True, text=True, timeout=110, env=here
    )
    assert done.stdout.split()[0] == "True", done.stderr
    assert "huggingface/tokenizers" not in done.stderr
    assert "Warning" not in done.stderr
