"""How far a run has come, so that a stopped one ends with the bits of one that never stopped.

The run is replayed: the same code goes through the same stages in the same order. A stage that was
finished returns what it returned then; the one that was interrupted gets its weights, optimizer and
sums back and goes on in the middle of its epoch. This works because everything random is a function
of the seed and the place in the run, batches among it. Files are in ``cleangpt/checkpoints.py``.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cleangpt.checkpoints import Checkpoint, Checkpoints
from cleangpt.errors import CheckpointError, Stopped
from cleangpt.integrity import parse_json_object
from cleangpt.metrics_log import MetricsLog, without_nonfinite
from cleangpt.runtime.faultpoints import faultpoint
from cleangpt.runtime.ranks import Ranks
from cleangpt.runtime.stopping import StopRequest

logger = logging.getLogger(__name__)

SOON = 10.0
"""Seconds of work that are sooner done again than saved, at the end of a stage."""
Tensors = dict[str, Tensor]
Values = dict[str, Any]


@dataclass(frozen=True)
class StagePosition:
    """Where inside a stage a run is.

    Args:
        epoch: Epochs that are done.
        steps: Optimizer steps done of the next one.
    """

    epoch: int
    steps: int


class Journal:
    """What is finished, what is going on, and the checkpoints that say so.

    Args:
        modules: All modules whose weights the run may change, by name; a trainer adds its own.
        ranks: The processes of the run; the first one alone writes.
        minutes: Between two checkpoints inside a stage, besides those at its end; 0 makes none
            inside.
        steps: Optimizer steps between two more; 0 makes none.
        head_is_tied: Whether the student's head is its embeddings now.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        ranks: Ranks,
        minutes: float,
        steps: int,
        head_is_tied: Callable[[], bool] = lambda: False,
    ) -> None:
        self.modules = modules
        self.head_is_tied = head_is_tied
        self._saves_inside = True
        self.stop = StopRequest()
        self._ranks = ranks
        self._minutes, self._steps = minutes, steps
        self._checkpoints: Checkpoints | None = None
        self.metrics = MetricsLog(None)
        self._finished: list[tuple[str, list[Values]]] = []
        self._resumed: Checkpoint | None = None
        self._count = self._serial = 0
        self._saved_at = time.monotonic()

    def open(self, checkpoints: Checkpoints, metrics: MetricsLog, *, resume: bool) -> bool:
        """Begin the run, or find where it stopped; return whether there is something to go on from.

        Raises:
            CheckpointError: If there are checkpoints and all are damaged, or the processes of the
                run do not find the same one.
        """
        self._checkpoints, self.metrics = checkpoints, metrics
        self._finished, self._count, self._serial = [], 0, 0
        self._saved_at = time.monotonic()
        self._resumed = found = checkpoints.newest() if resume else None
        if not self._ranks.same_everywhere("none" if found is None else str(found.step)):
            raise CheckpointError(
                f"The processes of this run see different checkpoints in {checkpoints.folder}.",
                "Give them an output_dir on a file system that they share.",
            )
        if self._resumed is not None:
            _check_state(self._resumed.state, checkpoints.folder)
            self._count = self._resumed.state["steps"]
            self._serial = checkpoints.last_number()  # a damaged one keeps its number
            self.metrics.pause()
            logger.info("Going on after %d steps, %s.", self._count, self._resumed.state["where"])
        elif resume:
            self.metrics.go_on(0)  # nothing was saved: all begins anew
        return self._resumed is not None

    def apart(self, name: str, modules: dict[str, nn.Module]) -> "Journal":
        """The journal of a part of the run that one process does alone, begun or gone on with.

        Args:
            name: The part's name, for its folder.
            modules: What that part trains; they get their weights back if it was begun.
        """
        part = Journal(modules, Ranks(), self._minutes, self._steps)
        part.stop = self.stop
        if self._checkpoints is not None:
            folder = self._checkpoints.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints = Checkpoints(folder, self._checkpoints.run_id)
            metrics = MetricsLog(folder / "metrics.jsonl")
            if part.open(checkpoints, metrics, resume=True):
                part.put_back()
        return part

    def take_in_part(self, name: str) -> None:
        """Take in the metrics of a finished part."""
        if self._checkpoints is not None and self._checkpoints.writes:
            self.metrics.take_in(MetricsLog(self._checkpoints.folder / name / "metrics.jsonl"))

    def remove_part(self, name: str) -> None:
        """Delete the checkpoints of a part, once the run's own tell that it is finished."""
        if self._checkpoints is not None and self._checkpoints.writes:
            shutil.rmtree(self._checkpoints.folder / name, ignore_errors=True)

    @property
    def was_tied(self) -> bool:
        """Whether the student's head was tied to its embeddings where the run goes on from."""
        return self._resumed is not None and bool(self._resumed.state["head_is_tied"])

    @property
    def stages_trained(self) -> int:
        """The stages finished so far, before a stop too, in which something was trained."""
        return sum(any(r.get("epoch_losses") for r in results) for _, results in self._finished)

    def put_back(self) -> None:
        """Give all modules the weights of the checkpoint; the stages are replayed on those.

        Raises:
            CheckpointError: If they do not fit.
        """
        assert self._resumed is not None
        for name, module in self.modules.items():
            prefix = f"weights/{name}/"
            own = {
                key.removeprefix(prefix): tensor
                for key, tensor in self._resumed.tensors.items()
                if key.startswith(prefix)
            }
            try:
                module.load_state_dict(own, strict=True)
            except RuntimeError as error:
                raise CheckpointError(
                    f"The checkpoint does not fit the {name}: {' '.join(str(error).split())[:200]}",
                    "Go on with the command that began the run, or start again with --overwrite.",
                ) from error

    def began(self, name: str) -> bool:
        """Whether the stage was begun before the run stopped: what prepares it was done then."""
        if self._resumed is None:
            return False
        state = self._resumed.state
        current = state["current"]
        return name in state["finished"] or (current is not None and current["name"] == name)

    def finished(self, name: str) -> list[Values] | None:
        """What the stage returned, if it was finished before the run stopped."""
        if self._resumed is None or name not in self._resumed.state["finished"]:
            return None
        results: list[Values] = self._resumed.state["finished"][name]
        self._finished.append((name, results))
        is_last = len(self._finished) == len(self._resumed.state["finished"])
        if is_last and self._resumed.state["current"] is None:
            self._arrive(self._resumed)
        return results

    def interrupted(self, name: str) -> tuple[StagePosition, Tensors, Values] | None:
        """Where the stage was when the run stopped, and its own state."""
        if self._resumed is None:
            return None
        current = self._resumed.state["current"]
        if current is None or current["name"] != name:
            raise CheckpointError(
                f"The checkpoint was made at {self._resumed.state['where']}, and the run is at"
                f" {name} without having come by there.",
                "Go on with the command that began the run, or start again with --overwrite.",
            )
        saved = self._resumed
        self._arrive(saved)
        own = {
            n.removeprefix("stage/"): t for n, t in saved.tensors.items() if n.startswith("stage/")
        }
        return StagePosition(current["epoch"], current["steps"]), own, current["values"]

    def step_done(self) -> bool:
        """Count an optimizer step; return whether to save now, as all processes agree."""
        self._count += 1
        faultpoint("step.taken", self._count)
        due = self._steps > 0 and self._count % self._steps == 0
        if self._minutes:
            due = due or time.monotonic() - self._saved_at > 60 * self._minutes
        return self._ranks.any(due or self.stop.signal is not None)

    def save(self, name: str, place: StagePosition, tensors: Tensors, values: Values) -> None:
        """Save in the middle of a stage, and stop there if that was asked.

        Raises:
            Stopped: If a signal came.
        """
        current = {"name": name, "epoch": place.epoch, "steps": place.steps, "values": values}
        where = f"{name}, epoch {place.epoch}, step {place.steps}"
        self._write(where, current, {f"stage/{key}": value for key, value in tensors.items()})
        self._stop_if_asked(f"at {where}; everything until there is saved")

    def cannot_save(self, reason: CheckpointError) -> None:
        """Go on without a checkpoint here, or stop where one was asked for with a signal.

        Raises:
            Stopped: If a signal came.
        """
        if self._saves_inside:
            logger.warning("No checkpoints inside this stage: %s", reason.cause)
        self._saves_inside = False
        self._saved_at = time.monotonic()
        self._stop_if_asked("in a stage that cannot be saved; it begins anew")

    def finish(self, name: str, results: list[Values], *, always: bool = False) -> None:
        """Save at the end of a stage, unless that was done just now, and stop if that was asked.

        Args:
            name: The stage's name.
            results: What it returns.
            always: Whether to save even so.

        Raises:
            Stopped: If a signal came.
        """
        self._finished.append((name, results))
        self._saves_inside = True
        faultpoint("stage.finished")
        due = always or self._steps > 0 or time.monotonic() - self._saved_at > SOON
        # The signal may have come to another process than the one that writes.
        if self._ranks.any(due or self.stop.signal is not None):
            self._write(f"the end of {name}", None, {})
            self._stop_if_asked(f"at the end of {name}; everything until there is saved")
        faultpoint("stage.handed_over")

    def stop_if_asked(self, where: str) -> None:
        """Stop where nothing can be saved, if that was asked.

        Args:
            where: For the message.

        Raises:
            Stopped: If a signal came.
        """
        self._stop_if_asked(f"{where}; it goes on from the last checkpoint, if there is one")

    def _stop_if_asked(self, where: str) -> None:
        if self._ranks.any(self.stop.signal is not None):
            number = int(self.stop.signal or 15)
            raise Stopped(
                f"stopped by signal {number} {where}",
                "Start the same command again with --resume to go on.",
                128 + number,
            )

    def _write(self, where: str, current: Values | None, tensors: Tensors) -> None:
        self._saved_at = time.monotonic()
        self._serial += 1
        if self._checkpoints is None or not self._ranks.is_main:
            return
        weights = {
            f"weights/{name}/{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in module.state_dict().items()
        }
        size = self.metrics.size()
        state = {
            "where": where,
            "steps": self._count,
            "head_is_tied": self.head_is_tied(),
            "finished": dict(self._finished),
            "current": current,
            "metrics_bytes": size,
            "metrics_sha256": self.metrics.checksum(size),
        }
        self._checkpoints.save(Checkpoint(self._serial, {**weights, **tensors}, state))

    def _arrive(self, saved: Checkpoint) -> None:
        """Begin to write again where the checkpoint was made."""
        self.metrics.go_on(saved.state["metrics_bytes"], saved.state["metrics_sha256"])
        self._resumed = None


def _check_state(state: Values, folder: Path) -> None:
    """Refuse a checkpoint that is whole and still not one of a journal.

    Raises:
        CheckpointError: If a value is missing or of another type.
    """
    current = state.get("current")
    kinds = {"where": str, "steps": int, "head_is_tied": bool, "finished": dict}
    kinds |= {"metrics_bytes": int, "metrics_sha256": str}
    places = {"name": str, "epoch": int, "steps": int, "values": dict}
    good = all(type(state.get(name)) is kind for name, kind in kinds.items()) and (
        current is None
        or (
            isinstance(current, dict)
            and all(type(current.get(name)) is kind for name, kind in places.items())
        )
    )
    if not good:
        raise CheckpointError(
            f"The newest checkpoint in {folder} does not say where the run was.",
            "It was written by other software; start again with --overwrite.",
        )


CHANGEABLE = (
    "precision",  # the one in use is compared
    *("log_interval", "hidden_state_pictures", "checkpoint_minutes", "checkpoint_steps"),
    *("activation_cache", "activation_cache_gb", "keep_activations", "track"),
)
"""Settings that decide no weight."""


def check_same_settings(path: Path, settings: Values) -> None:
    """Refuse to go on with other settings than a run began with.

    Args:
        path: The run's ``config.json``.
        settings: Those of now.

    Raises:
        CheckpointError: Listing what differs, or if the file is damaged.
    """
    try:
        earlier = parse_json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged: {error}",
            "Restore it from a copy of the run, or start again with --overwrite.",
        ) from error
    now = json.loads(json.dumps(without_nonfinite(settings)))
    different = [
        f"{name} was {earlier.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(earlier.keys() | now.keys())
        if name not in CHANGEABLE and earlier.get(name) != now.get(name)
    ]
    if different:
        raise CheckpointError(
            f"The run in {path.parent} has other settings: {'; '.join(different)}.",
            "Go on with the command that began it, or choose another output_dir.",
        )
