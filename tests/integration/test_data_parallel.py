"""Two processes over gloo train what one process trains."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cleangpt.runtime.ranks import Ranks
from tests.saved_teachers import build, save

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    teacher = build("gpt2")
    with torch.no_grad():  # a random teacher has nearly no logits to learn
        for parameter in teacher.parameters():
            parameter.mul_(3.0)
    save(place / "teacher", teacher)
    lines = (f"line {i} of a small text to learn {i * i} things from" for i in range(24))
    (place / "text.txt").write_text("\n\n".join(lines))
    return place


def command(place: Path, name: str, launcher: tuple[str, ...], processes: int) -> list[str]:
    start = [sys.executable]
    if launcher:
        start += [*launcher, str(processes)]
    return [
        *start,
        *("-m", "examples.run_distillation_example"),
        *("--teacher_model_name_or_path", str(place / "teacher"), "--device", "cpu"),
        *("--dataset_name", str(place / "text.txt"), "--block_size", "16", "--batch_size", "5"),
        *("--student_n_embd", "16", "--student_n_head", "2", "--precision", "fp32"),
        *("--output_dir", str(place / name), "--log_interval", "1", "--no_token_cache"),
        *("--recipe", "best", "--epochs_per_block", "2", "--lm_head_epochs", "1"),
        *("--polish_epochs", "1", "--validation_tokens", "300", "--no_overfit_gate"),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(place: Path, name: str, launcher: tuple[str, ...], processes: int, *flags: str) -> Path:
    words = [*command(place, name, launcher, processes), *flags]
    done = subprocess.run(
        words, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("student: ") == 1
    return place / name


def losses(folder: Path) -> list[tuple[str, float]]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (f"{e['event']} {e.get('stage')} {e.get('step')}", e["loss"]) for e in events if "loss" in e
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "student_model_final_distilled.pt"
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model_state_dict"]
    return state


def assert_same(one: Path, two: Path, closeness: float = 1e-5) -> None:
    names, values = zip(*losses(one), strict=True)
    other_names, other_values = zip(*losses(two), strict=True)
    assert names == other_names
    assert len(names) > 20
    torch.testing.assert_close(
        torch.tensor(other_values), torch.tensor(values), rtol=closeness, atol=1e-6
    )
    rows: Any = [json.loads((f / "manifest.json").read_text())["stages"] for f in (one, two)]
    for row, other in zip(*rows, strict=True):
        assert other["steps"] == row["steps"]
        assert other["tokens"] == row["tokens"]
        assert other.get("relative_error", 0) == pytest.approx(row.get("relative_error", 0), 1e-4)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-3, atol=1e-4)


def test_two_processes_train_what_one_trains(place: Path) -> None:
    one = run(place, "one", (), 1)
    assert_same(one, run(place, "two", TORCHRUN, 2), closeness=1e-6)


@pytest.mark.slow
def test_more_processes_than_rows(place: Path) -> None:
    flags = ("--batch_size", "1", "--max_samples", "8")
    assert_same(run(place, "one row", (), 1, *flags), run(place, "rows", TORCHRUN, 2, *flags))


@pytest.mark.slow
def test_more_processes_than_blocks_that_learn_apart(place: Path) -> None:
    flags = ("--block_inputs", "teacher", "--schedule", "decoupled")
    one, three = run(place, "apart", (), 1, *flags), run(place, "apart 3", TORCHRUN, 3, *flags)
    rows = [json.loads((f / "manifest.json").read_text())["stages"] for f in (one, three)]
    blocks = [[row["last_loss"] for row in each if "block" in row] for each in rows]
    assert len(blocks[0]) == 2
    assert blocks[0] == blocks[1]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sequential", "parallel_local"])
@pytest.mark.parametrize("cache", ["ram", "disk", "off"])
def test_every_schedule_and_cache(place: Path, schedule: str, cache: str) -> None:
    flags = ("--schedule", schedule, "--activation_cache", cache)
    flags = (*flags, "--gradient_accumulation_steps", "2")
    one = run(place, f"one {schedule} {cache}", (), 1, *flags)
    assert_same(one, run(place, f"two {schedule} {cache}", ACCELERATE, 2, *flags))
    assert_same(one, run(place, f"three {schedule} {cache}", TORCHRUN, 3, *flags))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("processes", [1, 3])
def test_a_process_that_dies_stops_all_and_others_go_on(
    place: Path, processes: int, killed: int
) -> None:
    """The launcher ends those that are left, unless they have seen it themselves by then.

    The first process is the one that writes checkpoints and the manifest.
    """
    name, flags = f"dies {processes} {killed}", ("--resume", "--checkpoint_steps", "3")
    words = [*command(place, name, TORCHRUN, 2), *flags]
    with subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True) as launched:
        wait_for(place / name / "metrics.jsonl", 30)
        os.kill(process_of_rank(killed, launched.pid), signal.SIGKILL)
        said = launched.communicate(timeout=120)[1]
    assert launched.returncode != 0
    causes = re.findall("^error: (.*)$", said, re.MULTILINE)
    assert causes or "SIGKILL" in said, said  # the launcher's own words, if it was first
    assert all("another process of this run has died" in cause for cause in causes), causes
    assert said.count("fix: See what it says") == len(causes)
    manifest = json.loads((place / name / "manifest.json").read_text())
    assert manifest["status"] in ("running", "failed", "stopped")
    others = TORCHRUN if processes > 1 else ()
    assert_same(run(place, f"straight {name}", (), 1), run(place, name, others, processes, *flags))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_left_says_that_another_has_died(place: Path, killed: int) -> None:
    """Without a launcher, which would end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    name = f"left {killed}"
    words = [*command(place, name, (), 1), "--resume", "--checkpoint_steps", "3"]
    both = []
    for rank in range(2):
        own = {**environment(), **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        both.append(subprocess.Popen(words, env=own, stderr=subprocess.PIPE, text=True))
    try:
        wait_for(place / name / "metrics.jsonl", 30)
        both[killed].kill()
        said = both[1 - killed].communicate(timeout=120)[1]
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[1 - killed].returncode == 5, said
    cause, remedy = said.strip().splitlines()[-2:]
    assert cause.startswith("error: another process of this run has died, or does not answer: ")
    assert remedy.startswith("fix: See what it says")
    assert_same(run(place, f"straight {name}", (), 1), run(place, name, (), 1, *words[-3:]))


def process_of_rank(rank: int, launcher: int) -> int:
    """Which of a launcher's processes has this rank."""
    found = [
        child.pid
        for child in psutil.Process(launcher).children()
        if child.environ().get("RANK") == str(rank)
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(place: Path) -> None:
    one = run(place, "straight", (), 1)
    flags = ("--resume", "--checkpoint_steps", "3")
    counts = iter([2, 3, 1])
    for lines in (30, 60):
        words = [*command(place, "changed", TORCHRUN, next(counts)), *flags]
        with subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL) as launched:
            wait_for(place / "changed" / "metrics.jsonl", lines)
            launched.terminate()
            assert launched.wait(timeout=120) != 0
        assert json.loads((place / "changed" / "manifest.json").read_text())["status"] == "stopped"
    assert_same(one, run(place, "changed", (), next(counts), *flags))


@pytest.mark.slow
def test_a_spread_teacher_teaches_the_same(place: Path) -> None:
    whole = run(place, "whole", TORCHRUN, 2)
    spread = run(place, "spread", TORCHRUN, 2, "--shard_teacher")
    assert losses(spread) == losses(whole)
    assert_same(whole, spread)


def wait_for(path: Path, lines: int = 1) -> None:
    end = time.monotonic() + 120
    while not path.is_file() or path.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.1)


def test_rows_are_shared_evenly_and_mostly_stay_where_they_were() -> None:
    chance = random.Random(0)
    keys = [chance.randbytes(16) for _ in range(800)]
    homes: list[dict[bytes, int]] = []
    for _ in range(2):  # two epochs in another order each
        home: dict[bytes, int] = {}
        for start in range(0, len(keys), 8):
            batch = keys[start : start + 8]
            rows = [Ranks(rank, 2).share(batch) for rank in range(2)]
            assert sorted(chain(*rows)) == list(range(8))
            assert [len(own) for own in rows] == [4, 4]
            home |= {batch[i]: rank for rank, own in enumerate(rows) for i in own}
        homes.append(home)
        chance.shuffle(keys)
    assert sum(homes[0][key] == homes[1][key] for key in keys) > 0.75 * len(keys)


@pytest.mark.parametrize("rows", range(1, 8))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_row_has_one_process_whatever_their_numbers(rows: int, count: int) -> None:
    keys = [bytes([7 * i % 3, i % 2]) for i in range(rows)]  # some of them equal
    found = [Ranks(rank, count).share(keys) for rank in range(count)]
    assert sorted(chain(*found)) == list(range(rows))
    assert max(map(len, found)) - min(map(len, found)) <= 1
