"""Runs of the real command, killed again and again until there were enough kills; then the figures.

    python -m tests.faults.soak --kills 100
    python -m tests.faults.soak --setup long --text FILE --kills 20 --minutes 30

Signals go to the command, its process group, its loader's worker, and to the processes of a
data-parallel run, at random instants; and fault points send them inside saves, hand-overs and the
store. Every run that comes to its end is compared with one nobody killed, bit for bit: tensors,
metrics, and at two steps the whole checkpoint with its optimizer states. What was done is in
``kills.jsonl``; a soak that is stopped itself goes on from there.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from cleangpt.cli import positive_int
from cleangpt.runtime.faultpoints import FAULT_POINTS
from tests.faults.kill_harness import (
    Running,
    descendants,
    differences,
    different_checkpoints,
    log_of,
    stages_logged,
    start_command,
    tensors_in,
)

COMMAND = ("-m", "examples.run_distillation_example", "--device", "cpu", "--threads", "1")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SMALL = (
    *("--max_samples", "6", "--student_n_embd", "24", "--student_n_head", "2", "--seed", "3"),
    *("--precision", "fp32", "--block_size", "64", "--batch_size", "4", "--no_token_cache"),
    *("--recipe", "best", "--lm_head_epochs", "1", "--validation_tokens", "1000"),
    *("--student_dropout", "0.1", "--checkpoint_steps", "5", "--log_interval", "1"),
)
DECOUPLED = ("--block_inputs", "teacher", "--schedule", "decoupled", "--no_overfit_gate")
LONG = (
    *("--student_n_embd", "96", "--student_n_head", "6", "--lr_per_block", "3e-3"),
    *("--batch_size", "8", "--block_size", "128", "--student_dropout", "0.1"),
    *("--precision", "fp32", "--polish_lr", "2e-3", "--recipe", "best", "--polish_epochs", "2"),
    *("--activation_cache", "disk", "--checkpoint_minutes", "0.5", "--log_interval", "10"),
)
SAVES = tuple(name for name in FAULT_POINTS if name not in ("step.taken", "file.deleted"))
KILLS_PER_RUN = 8
MOST_STARTS = 40
"""Of a run that nobody kills: it stops itself at two steps, of every block where they are apart."""
START_UP = 12.0
"""Seconds, more or less, that a command takes to import everything and load."""


@dataclass(frozen=True)
class Setup:
    """A command, and what of it can be killed.

    Args:
        words: The command.
        stops: Optimizer steps at which every run stops itself, to be compared there; where blocks
            learn apart from each other, each of them counts its own.
        targets: What signals go to.
    """

    words: tuple[str, ...]
    stops: tuple[int, int]
    targets: tuple[str, ...]

    @property
    def has_launcher(self) -> bool:
        return "rank" in self.targets


ALONE = ("main", "main", "inside", "inside")
RANKS = ("launcher", "rank", "all", "inside", "inside")
SETUPS = {
    "disk": Setup((*COMMAND, *SMALL, "--activation_cache", "disk"), (40, 130), ALONE),
    "workers": Setup(
        (*COMMAND, *SMALL, "--num_workers", "1", "--schedule", "parallel_local"),
        (10, 50),
        (*ALONE, "worker", "group"),
    ),
    "decoupled": Setup((*COMMAND, *SMALL, *DECOUPLED), (10, 50), ALONE),
    "two": Setup((*TWO, *COMMAND, *SMALL, "--activation_cache", "disk"), (40, 130), RANKS),
    "spread": Setup((*TWO, *COMMAND, *SMALL, *DECOUPLED), (10, 50), RANKS),
    "long": Setup((*TWO, *COMMAND, *LONG), (1000, 2300), RANKS),
}
SIGNALS = {
    "main": (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT),
    "group": (signal.SIGKILL, signal.SIGTERM),
    "worker": (signal.SIGKILL,),
    "launcher": (signal.SIGTERM, signal.SIGINT),
    "rank": (signal.SIGKILL,),
    "all": (signal.SIGKILL,),
    "inside": (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM),
}


@dataclass(frozen=True)
class Plan:
    """What is done to one process: the signal, to what, after how long, or at which fault point."""

    target: str
    number: signal.Signals
    starts_only: bool
    seconds: float
    fault: str

    @classmethod
    def drawn(cls, setup: Setup, chance: random.Random, gap: float) -> "Plan":
        target = chance.choice(setup.targets)
        number = chance.choice(SIGNALS[target])
        starts_only = target in ("main", "group", "all") and chance.random() < 0.1
        seconds = chance.uniform(0, START_UP if starts_only else 2 * gap)
        point, passes = chance.choice(SAVES), chance.randint(1, 4)
        return cls(target, number, starts_only, seconds, f"{point}:{passes}:{number.name}")


class Soak:
    """The runs in one folder.

    Args:
        folder: Where they are, with their logs.
        seed: Of all that is random.
        text: The data set of all commands; None is theirs.
    """

    def __init__(self, folder: Path, seed: int, text: str | None) -> None:
        self.folder = folder
        self.seed = seed
        self.text = () if text is None else ("--dataset_name", text)
        self.path = folder / "kills.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def note(self, event: str, **values: Any) -> None:
        record = {"event": event, **values}
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {json.dumps(record)}", file=sys.stderr, flush=True)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == event]

    def start(self, setup: Setup, folder: Path, fault: str = "") -> Running:
        faults = [f"step.taken:{stop}:SIGTERM" for stop in setup.stops]
        words = [*setup.words, *self.text, "--resume", "--output_dir", str(folder)]
        log = folder.with_suffix(".log")
        return start_command(words, log, ",".join([*faults, *([fault] if fault else [])]))

    def straight(self, name: str) -> Path:
        """A run that nobody kills, and copies of its checkpoints where all runs stop."""
        setup, folder = SETUPS[name], self.folder / f"straight-{name}"
        if any(record["setup"] == name for record in self.of("straight")):
            return folder
        began_at, kept, starts = time.monotonic(), 0, 0
        while (code := self.start(setup, folder).end(36_000)) != 0:
            kept += len(self._keep_stops(setup, folder))
            starts += 1
            if starts > MOST_STARTS or not kept:
                raise SystemExit(f"{folder} ended with {code}:\n{log_of(folder)[-3000:]}")
        if not kept:
            raise SystemExit(f"{folder} ended before it had stopped at any step of {setup.stops}")
        self.note("straight", setup=name, seconds=round(time.monotonic() - began_at, 1))
        return folder

    def killed(self, name: str, number: int) -> None:
        """Kill a run until it has come to its end, and compare it."""
        straight, setup = self.straight(name), SETUPS[name]
        manifest = json.loads((straight / "manifest.json").read_text())
        training = sum(stage["seconds"] for stage in manifest["stages"])
        folder = self.folder / f"killed-{number}-{name}"
        while True:
            chance = random.Random(f"{self.seed}/{len(self.records)}")
            plan = Plan.drawn(setup, chance, training / KILLS_PER_RUN)
            began_at, before = time.monotonic(), log_of(folder)
            process = self.start(setup, folder, plan.fault * (plan.target == "inside"))
            sent = carry_out(plan, process, folder, before)
            code = process.end(36_000)
            seconds = round(time.monotonic() - began_at, 1)
            self._check_code(setup, plan, code, folder)
            stops = [
                stop for stop in self._keep_stops(setup, folder) if at(straight, stop).exists()
            ]
            if stops:
                self._compare_stops(straight, folder, stops)
                self.note("stop", run=number, setup=name, at=stops, seconds=seconds)
            elif code != 0 and not sent and plan.target != "inside":  # where straight had no stop
                self.note("pause", run=number, setup=name, seconds=seconds)
            elif code != 0:
                landed = where(folder, before, plan)
                self.note(
                    "kill",
                    run=number,
                    setup=name,
                    target=plan.target,
                    code=code,
                    signal=plan.number.name,
                    landed=landed,
                    seconds=seconds,
                )
            else:
                self.note("end", run=number, setup=name, late=sent, seconds=seconds)
                break
        self._compare(straight, folder, name, number)

    def _check_code(self, setup: Setup, plan: Plan, code: int, folder: Path) -> None:
        """An exit code that no signal explains ends the soak."""
        allowed = {0, 143, -plan.number, 128 + plan.number}
        if plan.target == "worker":
            allowed.add(5)
        if not setup.has_launcher and code not in allowed:
            raise SystemExit(f"{folder}: {plan} ended with {code}:\n{log_of(folder)[-3000:]}")

    def _keep_stops(self, setup: Setup, folder: Path) -> list[str]:
        """Copy the checkpoints that are to be compared and were not copied before; name them."""
        path = folder / "manifest.json"
        if not path.exists() or json.loads(path.read_text())["status"] != "stopped":
            return []
        kept = []
        for state in sorted(folder.glob("checkpoints/**/step-*/state.json")):
            checkpoint, steps = state.parent, json.loads(state.read_text())["steps"]
            unit = checkpoint.parent.name.replace("checkpoints", "run")
            stop = f"{unit}-{steps}"
            if steps in setup.stops and not at(folder, stop).exists():
                shutil.copytree(checkpoint, at(folder, stop))
                kept.append(stop)
        return kept

    def _compare_stops(self, straight: Path, folder: Path, stops: list[str]) -> None:
        for stop in stops:
            found = different_checkpoints(at(straight, stop), at(folder, stop))
            if found:
                raise SystemExit(f"{folder} differs from {straight} at {stop}: {found}")

    def _compare(self, straight: Path, folder: Path, name: str, number: int) -> None:
        found = differences(straight, folder)
        if found:
            raise SystemExit(f"{folder} differs from {straight}: {found}")
        self.note("equal", run=number, setup=name, tensors=tensors_in(folder))
        for place in (folder, *self.folder.glob(f"{folder.name}-at-*")):
            shutil.rmtree(place)

    def figures(self) -> dict[str, Any]:
        """What was done so far."""
        kills = self.of("kill")
        timed = [record for record in self.records if "run" in record and "seconds" in record]
        return {
            "kills": len(kills),
            "by_signal": dict(Counter(record["signal"] for record in kills)),
            "by_target": dict(Counter(record["target"] for record in kills)),
            "landed": dict(Counter(record["landed"] for record in kills)),
            "runs_compared": len(self.of("equal")),
            "tensors_compared": sum(record["tensors"] for record in self.of("equal")),
            "optimizer_states_compared": sum(len(record["at"]) for record in self.of("stop")),
            "starts": sum(len(self.of(event)) for event in ("kill", "stop", "pause", "end")),
            "minutes": round(sum(r["seconds"] for r in timed) / 60, 1),
            "setups": dict(Counter(record["setup"] for record in kills)),
            "bit_equal": True,
        }


def at(folder: Path, stop: str) -> Path:
    """Where a run's checkpoint of a stop is copied to."""
    return folder.with_name(f"{folder.name}-at-{stop}")


def carry_out(plan: Plan, process: Running, folder: Path, before: str) -> bool:
    """Send the signal when its time has come; return whether it was sent."""
    if plan.target == "inside":
        return False
    while not plan.starts_only and process.wait(0.1) is None:
        if stages_logged(folder, before):
            break
    if process.wait(plan.seconds) is not None:
        return False
    below = descendants(process.pid)
    if plan.target in ("rank", "worker"):
        if below:
            Running(random.choice(below), process.wait).signal(plan.number)
    elif plan.target == "all":
        for pid in (process.pid, *below):
            Running(pid, process.wait).signal(plan.number)
    else:
        process.signal(plan.number, group=plan.target == "group")
    return True


def where(folder: Path, before: str, plan: Plan) -> str:
    """In what a kill landed: a save, a stage, or the start."""
    if plan.target == "inside":
        return plan.fault.rpartition(":")[0].rpartition(":")[0]
    if any(folder.glob("checkpoints/.step-*.tmp")):
        return "a save, by chance"
    stages = stages_logged(folder, before)
    name = stages[-1] if stages else "start-up"
    return "block" if name.startswith("block") else name


def main() -> None:
    """Go on until there were enough kills and enough time, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--kills", type=positive_int, default=100)
    parser.add_argument("--minutes", type=float, default=0.0, help="of killed runs, at least")
    parser.add_argument(
        "--setup", action="append", choices=tuple(SETUPS), help="default: all but long"
    )
    parser.add_argument("--text", help="data set, by name or path; default: the built-in text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    soak = Soak(arguments.folder, arguments.seed, arguments.text)
    names = arguments.setup or [name for name in SETUPS if name != "long"]
    for number in count(len(soak.of("equal"))):
        figures = soak.figures()
        if figures["kills"] >= arguments.kills and figures["minutes"] >= arguments.minutes:
            break
        soak.killed(names[number % len(names)], number)
    print(json.dumps(figures, indent=2))
    print(table_row(figures))


def table_row(figures: dict[str, Any]) -> str:
    """The figures as a line of a table in Markdown."""

    def parts(name: str) -> str:
        return ", ".join(f"{value} {key}" for key, value in sorted(figures[name].items()))

    inside = sum(n for name, n in figures["landed"].items() if "." in name or "save" in name)
    cells = (
        parts("setups"),
        f"{figures['kills']} ({parts('by_signal')})",
        inside,
        f"{figures['runs_compared']} of {figures['runs_compared']}",
        figures["optimizer_states_compared"],
        figures["minutes"],
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
