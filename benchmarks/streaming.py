"""Peak memory against the size of the corpus: streamed in passes, and packed at once.

    python -m benchmarks.streaming

writes ``results/streaming.md``. Text of each size is put into a temporary folder, and each way has
a process of its own: ``train`` trains a block of a tiny student on the first passes of a stream,
32 at most, with frozen states in a budget of 25 MB, and then reads and tokenizes all passes that
there are; ``stream`` only does the latter; ``memory`` packs the windows of the whole corpus.
"""

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory import forget_peak, peak_mib
from benchmarks.report import Section
from cleangpt.cli import CommandParser, positive_int, run_command

RESULT = "benchmarks/results/streaming.json"
WAYS = ("train", "stream", "memory")
SIZES = [4, 20, 200, 1000]
SEQ_LEN, PASS_TOKENS, MOST_TRAINED = 128, 2**17, 2**22
BYTES_PER_TOKEN = 3
WORDS_PER_DOCUMENT = 600
TEACHER_WIDTH, STUDENT_WIDTH = 32, 16


def measure_streaming(megabytes: list[int], ways: Sequence[str] = WAYS) -> Section:
    """Peak memory of each way for each size of the corpus.

    Args:
        megabytes: Sizes, in units of 1e6 bytes.
        ways: Some of ``WAYS``.
    """
    section = Section(
        "Memory against the size of the corpus",
        ["way", "corpus MB", "tokens", "passes", "peak MiB", "above the start MiB", "seconds"],
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in megabytes:
            path = Path(folder) / str(size) / "train.jsonl"
            write_corpus(path, size * 10**6)
            for way in ways:
                found = measure_apart(way, path.parent)
                numbers = [found[name] for name in ("tokens", "passes", "peak", "above", "seconds")]
                section.add(way, size, *numbers)
            path.unlink()
    return section


def write_corpus(path: Path, size: int) -> None:
    """Documents of built-in words in lines of JSON; no two windows are alike."""
    from cleangpt.builtin.corpus import builtin_texts

    words = " ".join(builtin_texts("train")).split(" ")
    draw = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < size:
            start = draw.randrange(len(words) - WORDS_PER_DOCUMENT)
            text = " ".join(words[start : start + WORDS_PER_DOCUMENT])
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
            number += 1


def measure_apart(way: str, folder: Path) -> dict[str, float]:
    """Read the corpus in a fresh process; return what that took."""
    command = [sys.executable, "-m", "benchmarks.streaming", "--way", way, "--folder", str(folder)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{way} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def read(way: str, folder: Path) -> dict[str, float]:
    """Read the corpus here, one way; numbers in tokens, mebibytes and seconds."""
    import datasets  # noqa: F401 - what it takes is no part of the corpus
    import psutil

    from cleangpt.data import StreamedWindows, TextDataset, load_texts, open_stream
    from cleangpt.teacher import load_teacher

    tokenizer = load_teacher("builtin").tokenizer
    gc.collect()
    start = psutil.Process().memory_info().rss / 2**20
    forget_peak()
    began = time.perf_counter()
    if way == "memory":
        whole = TextDataset(load_texts(str(folder)).texts, tokenizer, SEQ_LEN)
        tokens, passes = whole.num_tokens, 1
    else:
        stream = open_stream(str(folder))
        # All of the corpus, and a little of its beginning again.
        tokens = (folder / "train.jsonl").stat().st_size // BYTES_PER_TOKEN
        if way == "train":
            train(stream, tokenizer, folder / "run", min(tokens, MOST_TRAINED))
        windows = StreamedWindows(
            stream, tokenizer, SEQ_LEN, tokens=tokens, pass_tokens=PASS_TOKENS
        )
        for index in range(windows.passes):
            windows.enter(index)
        tokens, passes = windows.passes * windows.num_tokens, windows.passes
    seconds, peak = time.perf_counter() - began, peak_mib("cpu")
    return {
        "tokens": tokens,
        "passes": passes,
        "peak": peak,
        "above": peak - start,
        "seconds": seconds,
    }


def train(stream: Any, tokenizer: Any, output_dir: Path, tokens: int) -> None:
    """Train one block of a tiny student for an epoch over so many tokens, in passes."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from cleangpt.data import DistillationDataCollator, StreamedWindows, make_dataloader
    from config_distillation import GPTConfig
    from distillation.trainers import BackboneDistillationTrainer
    from model import build_student

    windows = StreamedWindows(stream, tokenizer, SEQ_LEN, tokens=tokens, pass_tokens=PASS_TOKENS)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=SEQ_LEN, n_embd=TEACHER_WIDTH, n_layer=1, n_head=1
    )
    student = GPTConfig(
        model_type="Vanilla",
        vocab_size=len(tokenizer),
        block_size=SEQ_LEN,
        n_layer=1,
        n_embd=STUDENT_WIDTH,
        n_head=1,
    )
    trainer = BackboneDistillationTrainer(
        GPT2LMHeadModel(config),
        build_student(student),
        tokenizer,
        make_dataloader(windows, DistillationDataCollator(tokenizer, SEQ_LEN), batch_size=32),
        output_dir=output_dir,
        overwrite=True,
        precision="fp32",
        audit_tokens=0,
        activation_cache_gb=PASS_TOKENS * (TEACHER_WIDTH + STUDENT_WIDTH) * 4 / 1e9,
    )
    trainer.train_backbone(epochs_per_block=1, lr_per_block=1e-3)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write the table; with ``--way``, measure one thing and print it as JSON.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
    """
    parser = CommandParser(prog="python -m benchmarks.streaming", description="Memory by corpus.")
    parser.add_argument(
        "--megabytes",
        type=positive_int,
        nargs="+",
        default=SIZES,
        help=f"sizes (default: {' '.join(map(str, SIZES))})",
    )
    parser.add_argument(
        "--ways", choices=WAYS, nargs="+", default=WAYS, help="what is measured (default: all)"
    )
    parser.add_argument("--output", default=RESULT, help=f"the JSON file (default: {RESULT})")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process")
    parser.add_argument("--folder", type=Path, help="the corpus of --way")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments: argparse.Namespace = parser.parse_args(argv)
    if arguments.way:
        print(json.dumps(read(arguments.way, arguments.folder)))
        return
    from benchmarks.report import machine, write_report

    section = measure_streaming(arguments.megabytes, arguments.ways)
    command = "python -m benchmarks.streaming --megabytes " + " ".join(
        str(size) for size in arguments.megabytes
    )
    path = Path(arguments.output)
    written = write_report({"streaming": section}, path, machine(), command, "Streaming")
    print(section.markdown())
    print(f"written: {written}")


if __name__ == "__main__":
    sys.exit(run_command(main))
