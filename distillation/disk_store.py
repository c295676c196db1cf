"""The rows of the activation store in a file of the run: for states that memory has no room for.

Format of a file, version 1: a header of 4096 bytes (one line of JSON, filled with spaces), then
rows as raw numbers. Beside it, once the run has ended and the file is kept, lies an index with what
each row is and a checksum over that and the row's bytes. So a row that is torn, flipped, stale or
another's is never mistaken for the right one, and without an index a file is worth nothing.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from cleangpt.disk_errors import disk_errors_explained
from cleangpt.errors import CheckpointError, EnvironmentProblem
from cleangpt.integrity import parse_json_object
from cleangpt.run_directory import write_atomically
from distillation.state_store import Budget, KeptState, Row, StateStore

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
HEADER_BYTES = 4096
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


class _Place(NamedTuple):
    """Where a row lies in the file."""

    offset: int
    size: int
    checksum: str


class DiskStore(StateStore):
    """Rows in one file, each in a slot of its own that the next level overwrites.

    Reads copy out of the page cache with ``read`` and not through a memory map. The bytes have to
    be copied into a batch anyway, so a map would save nothing; and where a mapped file is cut short
    or its disk fails, touching it kills the process (SIGBUS), while a read returns too few bytes.

    Args:
        path: The file of states. Its index has the same name and the ending ``.json``.
        header: What states in the file are of. A kept file is only opened if all of it is equal.
        weights: A checksum of the weights per level; rows of a kept file must have the same.
        budget: Where the bytes are counted, the header's apart.
        dtype: The widest dtype states are kept in.

    Raises:
        CheckpointError: If there is a kept file with another header or other weights, or one that
            is damaged. Nothing is changed then.
        EnvironmentProblem: If the file cannot be made.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        weights: Sequence[str],
        budget: Budget,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(budget, dtype)
        self.path = path
        self.index_path = path.with_suffix(".json")
        self._header = {"format": FORMAT_VERSION, **header, "dtype": _name(dtype)}
        self._places: dict[bytes, _Place] = {}
        self._free: dict[int, list[int]] = {}
        self._said: set[str] = set()
        self._is_full = False
        self.weights = dict(enumerate(weights))
        if self.index_path.exists():
            self._read_index()
        with disk_errors_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a row is larger than any buffer.
            self._file = path.open("r+b" if self.rows else "w+b", buffering=0)
            if not self.rows:
                self._file.write(_header_bytes(self._header))
            self._end = max(HEADER_BYTES, path.stat().st_size)

    def read(self, key: bytes, into: KeptState) -> bool:
        """Copy a known row; one that does not match its checksum is dropped, and said once."""
        place, raw = self._places[key], _raw(into)
        try:
            whole = self._transfer(self._file.readinto, place.offset, raw)
            cause = "differs from its checksum" if whole else "is missing from the file"
        except OSError as error:
            whole, cause = False, f"cannot be read ({error.strerror or error})"
        if whole and _checksum(key, self.rows[key], raw) == place.checksum:
            return True
        self._say(f"a kept state {cause}; it is dropped and computed from its tokens again")
        self.drop(key)
        return False

    def write(self, key: bytes, row: Row, state: KeptState) -> None:
        """Write into the slot freed last, which is the row's own if it had one, or a new one."""
        raw = _raw(state.contiguous())
        self.drop(key)  # first: half of a write must not be taken for a row
        offset = self._slot(len(raw))
        if offset is None:
            return
        try:
            self._transfer(self._file.write, offset, raw)
        except OSError as error:
            self._is_full = True
            self._say(
                f"{error.strerror or error}; states that do not fit are computed for every batch"
            )
            return
        self._places[key] = _Place(offset, len(raw), _checksum(key, row, raw))
        self.rows[key] = row

    def drop(self, key: bytes) -> None:
        """Forget one row; its slot is free for another of that size."""
        place = self._places.pop(key, None)
        if place is not None:
            self._free.setdefault(place.size, []).append(place.offset)
            del self.rows[key]

    def clear(self) -> None:
        """Forget all rows and shorten the file."""
        self._places.clear()
        self._free.clear()
        self.rows.clear()
        self.budget.give_back(self._end - HEADER_BYTES)
        self._end = HEADER_BYTES
        self._file.truncate(HEADER_BYTES)

    def finish(self, *, keep: bool) -> None:
        """Close the file and write its index, or remove both."""
        try:
            if keep and self.rows:
                self._write_index()
        except (OSError, EnvironmentProblem) as error:
            self._say(f"the states cannot be kept: {str(error).splitlines()[0]}")
            keep = False
        self.close()
        if not (keep and self.rows):
            self.index_path.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file and leave it as it is."""
        self.budget.give_back(self._end - HEADER_BYTES)
        self._file.close()

    def _slot(self, size: int) -> int | None:
        free = self._free.get(size)
        if free:
            return free.pop()
        if self._is_full or not self.budget.take(size):
            return None
        self._end += size
        return self._end - size

    def _transfer(self, move: Any, offset: int, raw: memoryview) -> bool:
        """Read or write all of ``raw`` at ``offset``; False if the file ends before."""
        self._file.seek(offset)
        done = 0
        while done < len(raw):
            moved = move(raw[done:])
            if not moved:
                return False
            done += moved
        return True

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s: %s (said once).", self.path, what)

    def _write_index(self) -> None:
        os.fsync(self._file.fileno())
        levels = {row.level for row in self.rows.values()}
        index = {
            "header": self._header,
            "weights": {str(level): self.weights[level] for level in sorted(levels)},
            "rows": {key.hex(): self._entry(key) for key in self.rows},
        }
        write_atomically(self.index_path, lambda path: path.write_text(json.dumps(index)))

    def _entry(self, key: bytes) -> list[Any]:
        row, place = self.rows[key], self._places[key]
        return [row.level, *row.shape, _name(row.dtype), place.offset, place.checksum]

    def _read_index(self) -> None:
        """Check a kept file against what is expected, and read what it holds."""
        try:
            index = parse_json_object(self.index_path.read_bytes())
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                written = parse_json_object(file.read(HEADER_BYTES))
            self._check_equal(written)
            self._check_equal(index["header"])
            found = {int(level): name for level, name in index["weights"].items()}
            self._check_weights(found)
            for key, entry in index["rows"].items():
                self._add_kept(bytes.fromhex(key), entry, size)
        except OSError as error:
            raise self._refusal(f"cannot be read ({error.strerror or error})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._refusal("or its index is damaged, or is no file of states") from error
        # The whole file counts, also what of it is no row any more.
        self.budget.used += max(0, size - HEADER_BYTES)

    def _check_equal(self, found: dict[str, Any]) -> None:
        for name in {**self._header, **found}:
            if found.get(name) != self._header.get(name):
                raise self._refusal(
                    f"has {name}={found.get(name)!r}, and this run {self._header.get(name)!r}"
                )

    def _check_weights(self, found: dict[int, str]) -> None:
        for level, name in found.items():
            if self.weights.get(level) != name:
                raise self._refusal(
                    f"has states entering block {level} from other weights than the"
                    f" {self._header.get('model', 'model')} has now"
                )

    def _add_kept(self, key: bytes, entry: Any, file_size: int) -> None:
        level, positions, width, dtype, offset, checksum = entry
        numbers = all(isinstance(number, int) for number in (level, positions, width, offset))
        inside = level in self.weights and positions > 0 and offset >= HEADER_BYTES
        if not numbers or not inside or width != self._header["d_state"]:
            raise ValueError(f"impossible row {entry}")
        row = Row(level, (positions, width), DTYPES[dtype])
        size = positions * width * self.kept_dtype(row.dtype).itemsize
        if offset + size > file_size:
            raise self._refusal(
                f"has {file_size:,} bytes, and its index lists a state up to byte {offset + size:,}"
            )
        self.rows[key], self._places[key] = row, _Place(offset, size, checksum)

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} {what}.",
            f"Delete {self.path.parent}; its states are computed again.",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _header_bytes(header: dict[str, Any]) -> bytes:
    return f"{json.dumps(header):<{HEADER_BYTES - 1}}\n".encode()


def _raw(state: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it; numpy has no bfloat16."""
    array: Any = state.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def _checksum(key: bytes, row: Row, raw: memoryview) -> str:
    """XXH3 over what the row is and its bytes, so a wrong entry of an index is found out too."""
    digest = xxhash.xxh3_64(f"{key.hex()} {row.level} {row.shape} {row.dtype}".encode())
    digest.update(raw)
    return str(digest.hexdigest())
