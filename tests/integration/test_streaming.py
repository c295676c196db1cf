"""Training on a stream in passes: as on data in memory, exact when it goes on, and bounded."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.data import (
    DistillationDataCollator,
    StreamedWindows,
    TextDataset,
    make_dataloader,
    open_stream,
)
from cleangpt.errors import CheckpointError, Stopped, UsageError
from distillation import DistillationTrainer
from tests.builders import tiny_student, tiny_teacher
from tests.byte_tokenizer import make_tokenizer
from tests.integration import test_data_parallel
from tests.integration.test_resume import BEST, assert_same, metrics, signalling

SIZE, PASS = 12, 8
VOCABULARY = 258
TOKENIZER = make_tokenizer(eos_token="<end>")
TRAINING: dict[str, Any] = {
    "epochs_per_block": [2, 1],
    "lr_per_block": 1e-2,
    "lm_head_epochs": 1,
}
place = test_data_parallel.place  # a fixture


def write_texts(folder: Path, windows: int) -> list[str]:
    """Documents whose packed tokens fill so many windows, and no more."""
    texts = [f"{'abc def ' * (index % 4)}{index * index}" for index in range(windows)]
    tokens = sum(len(text) + 1 for text in texts) - 1
    while tokens > windows * SIZE:
        tokens -= len(texts.pop()) + 1
    texts[-1] += "." * (windows * SIZE - tokens)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "train.jsonl").write_text(lines)
    return texts


def loader_of(data: Any) -> Any:
    return make_dataloader(data, DistillationDataCollator(TOKENIZER, SIZE), batch_size=4, seed=3)


def streamed(folder: Path, windows: int, per_pass: int = PASS) -> Any:
    tokens, of_pass = windows * SIZE, per_pass * SIZE
    stream = open_stream(str(folder))
    return StreamedWindows(stream, TOKENIZER, SIZE, tokens=tokens, pass_tokens=of_pass)


def trainer(folder: Path, data: Any, stop: int = 0, **options: Any) -> DistillationTrainer:
    return DistillationTrainer(
        tiny_teacher(vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=256),
        tiny_student(vocab_size=VOCABULARY, dropout=0.1),
        None,
        loader_of(data),
        output_dir=folder / "run",
        optimizer_cls=signalling(stop),
        **{"precision": "fp32", "audit_tokens": 100, "log_interval": 1, **options},
    )


def test_a_stream_of_one_pass_trains_the_bits_of_data_in_memory(tmp_path: Path) -> None:
    data = TextDataset(write_texts(tmp_path / "data", 16), TOKENIZER, SIZE)
    runs = []
    for name, windows in (("memory", data), ("stream", streamed(tmp_path / "data", 16, 16))):
        own = trainer(tmp_path / name, windows)
        runs.append((own, own.train(2, 1e-2, train_lm_head=False)))
    assert len(data) == 16
    assert_same(*runs, tmp_path / "memory", tmp_path / "stream")
    assert not (tmp_path / "stream" / "run" / "stream.json").exists()


def test_states_are_computed_once_a_pass_and_the_last_pass_is_kept(tmp_path: Path) -> None:
    write_texts(tmp_path / "data", 3 * PASS)
    own = trainer(
        tmp_path,
        streamed(tmp_path / "data", 3 * PASS),
        audit_tokens=0,
        activation_cache_gb=(PASS * SIZE * (32 + 16) * 4 + 0.5) / 1e9,  # of one pass, just so
    ).backbone_trainer
    rows, kept = [0, 0, 0], []
    own.after_epoch = lambda *_: kept.append(own.activations.bytes_kept)

    def count(block: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            rows[block] += len(inputs[0])

        return hook

    for block in range(3):
        mlp: Any = own.teacher.block(block).mlp  # blocks that are passed over are called too
        mlp.register_forward_hook(count(block))
    own.train_backbone(epochs_per_block=2, lr_per_block=1e-3)
    (first, last), passes = own.layer_map, 3
    # Block 0: each pass once, for two epochs. Block 1: its first pass is there, and moves on.
    assert rows[: first + 1] == [(passes + passes - 1) * PASS] * (first + 1)
    assert rows[first + 1 : last + 1] == [passes * PASS] * (last - first)
    assert kept == [PASS * SIZE * width * 4 for width in (*[32] * 6, *[32 + 16] * 6)]
    # Three passes of two batches, two epochs each; block 1 begins with the last pass.
    epochs = [e for e in metrics(tmp_path) if e["event"] == "epoch"]
    assert [(e["stage"], e["epoch"]) for e in epochs[5:7]] == [("block-00", 5), ("block-01", 0)]
    assert len(epochs) == 12
    assert own.train_dataloader.dataset.entered == 1


def run(folder: Path, texts: Path, stops: list[int], polish: int = 0, **options: Any) -> Any:
    """Train on three passes, stopped after so many steps each time."""
    for stop in stops:
        with pytest.raises(Stopped, match="saved"):
            resuming(folder, texts, stop, **options).train(**TRAINING, polish_epochs=polish)
    own = resuming(folder, texts, **options)
    return own, own.train(**TRAINING, polish_epochs=polish)


def resuming(folder: Path, texts: Path, stop: int = 0, **options: Any) -> DistillationTrainer:
    return trainer(folder, streamed(texts, 3 * PASS), stop, resume=True, **options)


def check_resume(tmp_path: Path, stops: list[int], **options: Any) -> None:
    write_texts(tmp_path / "data", 3 * PASS)
    straight = run(tmp_path / "straight", tmp_path / "data", [], **options)
    resumed = run(tmp_path / "resumed", tmp_path / "data", stops, **options)
    assert_same(straight, resumed, tmp_path / "straight", tmp_path / "resumed")


def test_a_stop_in_a_pass_changes_no_bit_and_a_second_one_neither(tmp_path: Path) -> None:
    # Block 0 takes 3 x 2 x 2 steps, block 1 half of that.
    check_resume(tmp_path, [7, 3])
    index = json.loads((tmp_path / "resumed" / "run" / "stream.json").read_text())
    assert sorted(index) == ["0", "1", "2"]
    write_texts(tmp_path / "data", 2 * PASS)
    with pytest.raises(CheckpointError, match="has another data"):
        run(tmp_path / "resumed", tmp_path / "data", [])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sequential", "parallel_local", "decoupled"])
@pytest.mark.parametrize("cache", ["ram", "disk", "off"])
@pytest.mark.parametrize("options", [{}, BEST], ids=["tutorial", "best"])
def test_stops_in_every_schedule_and_store(
    schedule: str, cache: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if schedule == "decoupled":
        options = {**options, "block_inputs": "teacher"}
    how = {"schedule": schedule, "activation_cache": cache, **options}
    check_resume(tmp_path, [5, 9, 2], polish=2, **how)


@pytest.mark.slow
def test_two_processes_train_on_a_stream_what_one_trains(place: Path) -> None:
    flags = ("--streaming", "--stream_tokens", "800", "--activation_cache_gb", "0.00025")
    ends = [
        test_data_parallel.run(place, f"streamed by {count}", launcher, count, *flags)
        for launcher, count in (((), 1), (test_data_parallel.TORCHRUN, 2))
    ]
    test_data_parallel.assert_same(*ends)
    indices = [json.loads((end / "stream.json").read_text()) for end in ends]
    assert indices[0] == indices[1]
    assert len(indices[0]) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once `datasets` and the tokenizer have filled what they keep: a few tens of megabytes.

    40 MB more of text are 13 million tokens: kept in the leanest form, they would take 50 MiB.
    """
    from benchmarks.streaming import measure_streaming

    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # what is free is found, whoever freed it

    def growth(way: str, small: int, large: int) -> float:
        above = [float(str(row[5])) for row in measure_streaming([small, large], (way,)).rows]
        return above[1] - above[0]

    assert growth("stream", 60, 100) < 15
    assert growth("memory", 4, 20) > 100


# The command --------------------------------------------------------------------------------------


def arguments_of(*flags: str) -> argparse.Namespace:
    from distillation.commands.settings import parse_arguments

    return parse_arguments(["--streaming", "--dataset_name", "x.jsonl", *flags])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--no_packing", "--no_packing (every window of a stream is full)"),
        ("--max_samples 3", "--max_samples (--stream_tokens says how much is read)"),
        ("--num_workers 1", "--num_workers (a pass is in memory)"),
        ("--token_cache d", "--token_cache (nothing of a stream is kept on disk)"),
        ("--keep_activations", "--keep_activations (files would hold the last pass alone)"),
    ],
)
def test_flags_that_cannot_go_with_a_stream_are_refused(flags: str, words: str) -> None:
    from distillation.commands.data import find_documents

    with pytest.raises(UsageError) as caught:
        find_documents(arguments_of(*flags.split()))
    assert words in caught.value.cause
    assert flags.split()[0] in caught.value.remedy
    alone = arguments_of("--stream_tokens", "5")
    alone.streaming = False
    with pytest.raises(UsageError, match="nothing is streamed"):
        find_documents(alone)


def test_a_pass_is_what_the_byte_budget_holds() -> None:
    from types import SimpleNamespace

    from cleangpt.data.streamed_windows import PASS_TOKENS
    from distillation.commands.streaming import pass_tokens

    teacher: Any = SimpleNamespace(model=tiny_teacher())
    with torch.device("meta"):
        student = tiny_student()

    def size(*flags: str) -> int:
        return pass_tokens(arguments_of("--recipe", "tutorial", *flags), teacher, student)

    budget = ("--activation_cache_gb", "0.001920")
    assert size() == size(*budget, "--activation_cache", "off") == PASS_TOKENS
    assert size(*budget) == 1_920_000 // ((32 + 16) * 4)
    assert size(*budget, "--activation_dtype", "bf16") == 2 * size(*budget)
    assert size(*budget, "--validation_tokens", "500") == size(*budget) - 500
    # Two student blocks learn from the teacher at a time.
    assert size(*budget, "--schedule", "parallel_local") == 1_920_000 // (2 * 32 * 4)
    with pytest.raises(UsageError, match="holds the states of 5 tokens, fewer than one batch"):
        size("--activation_cache_gb", "1e-6")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A run on two passes over a data set without a validation split."""
    from tests.contract.local_hub import save_tiny_gpt2, write_stories

    save_tiny_gpt2(tmp_path / "teacher", blocks=2)
    write_stories(tmp_path / "stories")
    (tmp_path / "stories" / "validation.jsonl").rename(tmp_path / "stories" / "test.jsonl")
    flags = ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--device", "cpu"]
    flags += ["--dataset_name", str(tmp_path / "stories"), "--block_size", "32"]
    flags += ["--student_n_embd", "16", "--student_n_head", "2", "--recipe", "tutorial"]
    flags += ["--epochs_per_block", "1", "--lm_head_epochs", "1", "--validation_tokens", "100"]
    flags += ["--streaming", "--stream_tokens", "3000", "--activation_cache_gb", "4.2e-4"]
    return [*flags, "--output_dir", str(tmp_path / "run"), "--precision", "fp32"]


def test_the_command_trains_on_a_stream(
    tmp_path: Path, flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    from distillation.commands.distil import evaluation_command, prepare, train

    caplog.set_level("INFO")
    arguments = arguments_of(*flags)
    results = train(prepare(arguments)[0], arguments)
    # 1640 tokens fit, with 100 apart for validation: two passes of 46 windows.
    assert "2,944 tokens in 2 passes of 46 windows of 32" in caplog.text
    assert "No validation: data set" in caplog.text
    assert [row["steps"] for row in (*results["blocks"], results["head"])] == [12, 12, 12]
    assert (tmp_path / "run" / "stream.json").is_file()
    command = evaluation_command(arguments, results["student_path"])
    assert "--streaming --max_samples 200" in command


@pytest.mark.slow
def test_a_stream_is_planned_and_its_student_evaluated(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from distillation.evaluation import evaluate_distilled_model
    from examples.run_distillation_example import main

    main([*flags, "--plan"])
    table = capsys.readouterr().out
    assert [line.split()[:2] for line in table.splitlines()[1:4]] == [
        [name, "12"] for name in ("block-00", "block-01", "lm-head")
    ]
    assert "377 kB needed" in table  # 46 windows of 32 tokens, 64 numbers each
    main(flags)
    words = ["--model_path", str(tmp_path / "run"), "--dataset_name", str(tmp_path / "stories")]
    words += ["--teacher_model_name", str(tmp_path / "teacher"), "--speed_seconds", "0"]
    evaluate_distilled_model.main([*words, "--streaming", "--max_samples", "3", "--device", "cpu"])
    assert "perplexity" in capsys.readouterr().out
