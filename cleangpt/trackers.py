"""TensorBoard, Weights & Biases and trackio, when asked: they follow what a run writes down.

Nothing here is imported, and none of the packages, unless a run names a tracker. A tracker that
fails is dropped with one warning: what it shows is in ``metrics.jsonl`` too, and the run goes on.
"""

import importlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from cleangpt.errors import EnvironmentProblem, UsageError
from cleangpt.metrics_table import CurvePoint, curve_point
from cleangpt.run_directory import RunDirectory

logger = logging.getLogger(__name__)

PROJECT = "cleangpt-distillation"
"""Where runs stand in W&B and trackio; W&B's own WANDB_PROJECT wins."""


class Tracker(Protocol):
    """What each of them can do."""

    def add(self, point: CurvePoint) -> None:
        """Show a point of a stage's curves."""

    def rewrite(self, points: Iterable[CurvePoint]) -> None:
        """A stopped run goes on, and these are its points so far."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run, a folder per stage, so that blocks overlay.

    Args:
        run: The open run.
        settings: Not shown.
    """

    def __init__(self, run: RunDirectory, settings: dict[str, Any]) -> None:
        self._folder = run.path / "tensorboard"
        self._writers: dict[str, Any] = {}

    def add(self, point: CurvePoint) -> None:
        """Write them down; each stage counts its own steps and epochs."""
        from torch.utils.tensorboard import SummaryWriter

        if point.stage not in self._writers:
            folder = str(self._folder / point.stage)
            self._writers[point.stage] = SummaryWriter(folder, flush_secs=10)
        for name, value in point.named().items():
            self._writers[point.stage].add_scalar(name, value, point.at)

    def rewrite(self, points: Iterable[CurvePoint]) -> None:
        """Write all files anew: nothing that was done again then stands there twice."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        for point in points:
            self.add(point)

    def close(self) -> None:
        """Flush and close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


class WandB:
    """A run of Weights & Biases, in ``wandb/`` of the run; offline unless WANDB_MODE says more.

    Args:
        run: The open run; one that goes on keeps its id.
        settings: What its page lists.
    """

    def __init__(self, run: RunDirectory, settings: dict[str, Any]) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.path.absolute().name,
            id=run.run_id,
            dir=run.path,
            config=settings,
            mode=mode,
            # Offline there is nobody to ask what was there before; `wandb sync --append` joins it.
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._known: set[str] = set()

    def add(self, point: CurvePoint) -> None:
        """Log them over the stage's own steps or epochs: W&B's own counter may not go back."""
        place = f"{point.stage}/{point.event}"
        values = {f"{point.stage}/{name}": value for name, value in point.named().items()}
        for name in values.keys() - self._known:
            self._run.define_metric(name, step_metric=place)
            self._known.add(name)
        self._run.log({place: point.at, **values})

    def rewrite(self, points: Iterable[CurvePoint]) -> None:
        """Nothing: what was logged cannot be taken back, and what is done again is the same."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """A run in trackio's local database (TRACKIO_DIR); ``trackio show`` is its page.

    Args:
        run: The open run; one that goes on keeps its name.
        settings: What its page lists.
    """

    def __init__(self, run: RunDirectory, settings: dict[str, Any]) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=PROJECT,
            name=f"{run.path.absolute().name}-{run.run_id[:8]}",
            config=settings,
            resume="allow",
            embed=False,
        )

    def add(self, point: CurvePoint) -> None:
        """Log them at the stage's own step or epoch."""
        values = {f"{point.stage}/{name}": value for name, value in point.named().items()}
        self._run.log(values, step=point.at)

    def rewrite(self, points: Iterable[CurvePoint]) -> None:
        """Nothing: what was logged cannot be taken back, and what is done again is the same."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


TRACKERS: dict[str, Callable[[RunDirectory, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""By the name of the package that each needs."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what cannot be used, before anything slow begins.

    Raises:
        UsageError: If a name is unknown.
        EnvironmentProblem: If a package is not installed.
    """
    unknown = sorted(set(names) - TRACKERS.keys())
    if unknown:
        raise UsageError(
            f"track={', '.join(unknown)!r} is not one of {', '.join(TRACKERS)}.",
            "Name some of them with commas between, as --track tensorboard,wandb.",
        )
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"--track {','.join(names)} needs {', '.join(missing)}, which this Python does not"
            " have.",
            "Install the extra: pip install 'cleangpt-distillation[track]'; or leave --track out.",
        )


@contextmanager
def tracked(run: RunDirectory, names: Sequence[str], settings: dict[str, Any]) -> Iterator[None]:
    """Let trackers follow what an open run writes down; only its first process has any.

    Args:
        run: The run. One that is followed already, because a trainer joins it, stays as it is.
        names: Of :data:`TRACKERS`.
        settings: What a tracker's page lists.

    Raises:
        UsageError: If a name is unknown.
        EnvironmentProblem: If a package is not installed.
    """
    check_trackers(names)
    log = run.metrics
    followed = {each.name for each in log.followers if isinstance(each, _Follower)}
    new = [name for name in dict.fromkeys(names) if name not in followed] if run.writes else []
    followers = [_Follower(name, run, settings) for name in new]
    log.followers += followers
    try:
        yield
    finally:
        for follower in followers:
            log.followers.remove(follower)
            follower.close()


class _Follower:
    """Hands a log's events to a tracker until that fails."""

    def __init__(self, name: str, run: RunDirectory, settings: dict[str, Any]) -> None:
        self.name = name
        self._tracker: Tracker | None = None
        with self._failures_are_said():
            self._tracker = TRACKERS[name](run, {**settings, **run.record})

    def write(self, record: dict[str, Any]) -> None:
        point = curve_point(record)
        if point is not None and self._tracker is not None:
            with self._failures_are_said():
                self._tracker.add(point)

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        if self._tracker is not None:
            with self._failures_are_said():
                self._tracker.rewrite(filter(None, map(curve_point, records)))

    def close(self) -> None:
        if self._tracker is not None:
            with self._failures_are_said():
                self._tracker.close()

    @contextmanager
    def _failures_are_said(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # another library's, of any kind
            self._tracker = None
            logger.warning(
                "%s stopped following the run, which goes on without it: %s: %s",
                *(self.name, type(error).__name__, " ".join(str(error).split())[:200]),
            )
