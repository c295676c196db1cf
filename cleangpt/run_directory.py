"""One directory per run: what it was, what it measured, what it made.

Every file is written under a temporary name in the same folder, synced to disk and then renamed, so
a file is either complete or not there. A lock keeps two runs out of one directory; the kernel frees
it when the process ends, however it ends.
"""

import contextlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cleangpt import __version__
from cleangpt.disk_errors import disk_errors_explained
from cleangpt.errors import EnvironmentProblem, Stopped, UsageError
from cleangpt.integrity import file_digest, parse_json_object, sealed, write_sums
from cleangpt.manifest import FORMAT_VERSION, MANIFEST_NAME, check_same_run, read_manifest
from cleangpt.metrics_log import MetricsLog, without_nonfinite
from cleangpt.run_lock import locked
from cleangpt.runtime.faultpoints import faultpoint
from cleangpt.runtime.launcher import launched

logger = logging.getLogger(__name__)

RUN_FILES = (
    MANIFEST_NAME,
    "config.json",
    "config.yaml",
    "audit.json",
    "metrics.jsonl",
    "metrics.csv",
    "tensorboard",
    "wandb",
    "stream.json",
    "student_model_final_distilled.pt",
    "stitching_layers.safetensors",
    "final",
    "start",
    "pictures",
    "activations",
    "checkpoints",
    "evaluation",
)
"""What a run may write into its directory, and all that ``overwrite`` ever deletes."""
CUT_OFF = "overwritten"
"""The status of a run that is being deleted."""


class RunDirectory:
    """The directory of one run. Of a run of several processes, the first one alone writes.

    Args:
        path: The run's ``output_dir``; made when the run is opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.writes = launched(os.environ)[0] == 0
        self.attachments: dict[str, bytes] = {}
        """Files by name that a new run here begins with."""
        self.metrics = MetricsLog(self.path / "metrics.jsonl" if self.writes else None)
        self.run_id = uuid.uuid4().hex
        self._manifest: dict[str, Any] = {}

    @property
    def is_open(self) -> bool:
        """Whether a run holds the directory through this object."""
        return bool(self._manifest)

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest of the open run says so far."""
        return dict(self._manifest)

    @contextmanager
    def opened(
        self, about: dict[str, Any], *, overwrite: bool = False, resume: bool = False
    ) -> Iterator["RunDirectory"]:
        """Hold the directory for one run; its manifest ends as "done", "stopped" or "failed".

        Opening it again inside the block changes nothing and joins the run that is open.

        Args:
            about: What the manifest says of the run (teacher, student, data, settings).
            overwrite: Whether the files of an earlier run there may be deleted.
            resume: Whether to go on with the run that is there, if there is one.

        Raises:
            UsageError: If an earlier run's files are there and neither is True.
            CheckpointError: If the run there is another one: of another teacher, student or data.
            EnvironmentProblem: If the directory cannot be written, or another run holds it.
        """
        if self.is_open:  # a trainer inside a larger run
            yield self
            return
        goes_on = resume and self._has_run(about)
        if not self.writes:
            with self._joined():
                yield self
            return
        self.check_room(overwrite, resume)
        self._make()
        with locked(self.path):
            self._sweep()
            if goes_on:
                self._take_up()
            else:
                self._make_room(overwrite)
            self._manifest = {
                "format_version": FORMAT_VERSION,
                "library_version": __version__,
                "run_id": self.run_id,
                "status": "running",
                "stages": [],
                **about,
            }
            self.write_manifest()
            for name, content in () if goes_on else self.attachments.items():
                self.write_bytes(name, content)
            try:
                yield self
                self._manifest.update(status="done", files=self._sums())
                self.write_manifest()
                faultpoint("run.done")
            except BaseException as error:
                status = "stopped" if isinstance(error, Stopped) else "failed"
                self._manifest.update(status=status, reason=f"{type(error).__name__}: {error}")
                # The error that ended the run matters more than one about its manifest.
                with contextlib.suppress(EnvironmentProblem):
                    self.write_manifest()
                raise
            finally:
                self._manifest = {}

    def _has_run(self, about: dict[str, Any]) -> bool:
        """Whether there is a run to go on with; its name is this one's then."""
        earlier = self.manifest()
        if earlier is None or earlier.get("status") == CUT_OFF:
            return False
        check_same_run(earlier, about, self.path)
        self.run_id = str(earlier["run_id"])
        return True

    def _sweep(self) -> None:
        """Delete what writes that were cut off have left under temporary names."""
        for name in (*RUN_FILES, "probe"):
            for stale in self.path.glob(f".{name}.*.tmp"):
                _delete(stale)

    def _take_up(self) -> None:
        """Make ready to go on with the run that is there, now that it is locked."""
        if (self.manifest() or {}).get("status") == "done":
            raise UsageError(
                f"The run in {self.path} is done by now.",
                "Start the command again to see its results, or pass --overwrite.",
            )
        shutil.rmtree(self.path / "activations", ignore_errors=True)

    @contextmanager
    def _joined(self) -> Iterator[None]:
        """Be open, and write nothing, in a process that another one writes for."""
        self._manifest = {"run_id": self.run_id, "stages": []}
        try:
            yield
        finally:
            self._manifest = {}

    def manifest(self) -> dict[str, Any] | None:
        """What the manifest there says; None if no run of this library is there.

        Raises:
            CheckpointError: If it is damaged, or of a newer version of this library.
        """
        return read_manifest(self.path)

    def note(self, **values: Any) -> None:
        """Add to the manifest; it is written with the next stage, or at the end."""
        self._manifest.update(values)

    def add_stage(self, row: dict[str, Any]) -> None:
        """Record a finished stage in the manifest."""
        self._manifest["stages"].append(row)
        self.write_manifest()

    def write_manifest(self) -> None:
        """Write the manifest as it stands."""
        self.write_json(MANIFEST_NAME, sealed(without_nonfinite(self._manifest)))

    def _sums(self) -> dict[str, str]:
        """The checksums of the run's files; its folders have their own."""
        files = (self.path / name for name in RUN_FILES if name != MANIFEST_NAME)
        return {path.name: file_digest(path) for path in files if path.is_file()}

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as JSON, atomically."""
        text = json.dumps(without_nonfinite(value), indent=2, allow_nan=False)
        return self.write_bytes(name, f"{text}\n".encode())

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file, atomically."""
        if not self.writes:
            return self.path / name
        path = self.path / name
        return write_atomically(path, lambda place: place.write_bytes(content), len(content))

    def write_folder(self, name: str, fill: Callable[[Path], object]) -> Path:
        """Make a folder, atomically: ``fill`` gets a temporary one, which is then renamed."""
        target = self.path / name
        if not self.writes:
            return target
        temporary = self.path / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with disk_errors_explained(target):
                temporary.mkdir()
                fill(temporary)
                write_sums(temporary)
                for file in temporary.rglob("*"):
                    if file.is_file():
                        follow_umask_and_sync(file)
                faultpoint("folder.before_swap")
                if target.exists():
                    shutil.rmtree(target)
                faultpoint("folder.removed")
                temporary.replace(target)
                faultpoint("folder.renamed")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _make(self) -> None:
        with disk_errors_explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{uuid.uuid4().hex[:8]}.tmp"
            probe.touch()
            probe.unlink()

    def check_room(self, overwrite: bool, resume: bool = False) -> list[str]:
        """Refuse a place that a run may not use, and return what it would replace there.

        Writes nothing, so a command can ask before anything slow is loaded.

        Raises:
            UsageError: If a run's files are there and may not, or must not, be replaced.
            EnvironmentProblem: If the place is not a directory that can be written.
        """
        if not self.writes:
            return []
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self.path.lstat()
            place = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        except (OSError, ValueError) as error:  # too long, or with a NUL in it
            raise EnvironmentProblem(
                f"{str(self.path)!r} cannot be a directory: {getattr(error, 'strerror', error)}.",
                "Choose another output_dir (--output_dir).",
            ) from error
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise EnvironmentProblem(
                f"Cannot write {self.path}: {place} is not a writable directory.",
                "Choose another output_dir (--output_dir).",
            )
        if overwrite and resume:
            raise UsageError(
                "resume goes on with the run that is there, and overwrite deletes it.",
                "Give only one of --resume and --overwrite.",
            )
        found = [name for name in RUN_FILES if (self.path / name).exists()]
        if resume and (self.path / MANIFEST_NAME).is_file():
            return []
        if found and not overwrite:
            raise UsageError(
                f"{self.path} already holds a run ({', '.join(found)}).",
                "Pass --resume to go on with it, --overwrite to replace it (overwrite=True), or"
                " choose another output_dir.",
            )
        if found and "run_id" not in self._said():
            raise UsageError(
                f"{self.path} holds {', '.join(found)}, but no manifest of a run of this library.",
                "Nothing was deleted; choose another output_dir (--output_dir).",
            )
        return found

    def _said(self) -> dict[str, Any]:
        """What the manifest there says, unchecked; empty if it is none."""
        try:
            return parse_json_object((self.path / MANIFEST_NAME).read_bytes())
        except (OSError, ValueError):
            return {}

    def _make_room(self, overwrite: bool) -> None:
        earlier = self._said()
        found = self.check_room(overwrite or earlier.get("status") == CUT_OFF)
        if MANIFEST_NAME in found:
            # Cut off between two files, it must still be known as ours, and as no run any more.
            mark = {"format_version": FORMAT_VERSION, "status": CUT_OFF}
            self.write_json(MANIFEST_NAME, sealed({**mark, "run_id": earlier["run_id"]}))
        for name in sorted(found, key=MANIFEST_NAME.__eq__):
            _delete(self.path / name)
            faultpoint("file.deleted")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_atomically(
    path: Path, write: Callable[[Path], object], needed_bytes: int | None = None
) -> Path:
    """Let ``write`` make a temporary sibling of ``path``, sync it, and rename it to ``path``.

    Args:
        path: The file.
        write: Gets the temporary one's path.
        needed_bytes: About how large the file is, for the message; None if that is not known.

    Raises:
        EnvironmentProblem: If the disk is full or the place cannot be written; what was at ``path``
            before is then still there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with disk_errors_explained(path, needed_bytes):
            write(temporary)
            follow_umask_and_sync(temporary)
            faultpoint("file.before_rename")
            temporary.replace(path)
            faultpoint("file.renamed")
    finally:
        temporary.unlink(missing_ok=True)
    return path


def follow_umask_and_sync(path: Path) -> None:
    """Give the file the mode the user's umask asks for (safetensors makes 0600) and sync it."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
