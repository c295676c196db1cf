"""The stores of states: what is read is what was written, or nothing, whatever befalls a file."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cleangpt.errors import CheckpointError, EnvironmentProblem
from distillation.disk_store import HEADER_BYTES, DiskStore
from distillation.state_store import Budget, RamStore, Row, StateStore

WIDTH = 4
WEIGHTS = ["w0", "w1", "w2"]
HEADER = {"model": "teacher", "d_state": WIDTH, "precision": "fp32"}


def key(number: int) -> bytes:
    return bytes([number] * 16)


def disk(
    place: Path, limit: int = 2**20, dtype: torch.dtype = torch.float32, **changes: Any
) -> DiskStore:
    weights = changes.pop("weights", WEIGHTS)
    return DiskStore(place / "teacher.states", {**HEADER, **changes}, weights, Budget(limit), dtype)


def make(kind: str, place: Path, limit: int = 2**20, dtype: torch.dtype = torch.float32) -> Any:
    return RamStore(Budget(limit), dtype) if kind == "ram" else disk(place, limit, dtype)


def put(store: StateStore, number: int, state: Tensor, level: int = 0) -> None:
    row = Row(level, (state.shape[0], state.shape[1]), state.dtype)
    store.write(key(number), row, state.to(store.kept_dtype(state.dtype)))


def get(store: StateStore, number: int) -> Tensor | None:
    """The row, or None if it is not there or turns out to be damaged."""
    row = store.rows.get(key(number))
    if row is None:
        return None
    into = torch.empty(row.shape, dtype=store.kept_dtype(row.dtype))
    return into if store.read(key(number), into) else None


def states(count: int, positions: int = 3) -> list[Tensor]:
    return list(torch.randn(count, positions, WIDTH))


@contextmanager
def used(store: StateStore, keep: bool = False) -> Iterator[Any]:
    try:
        yield store
    finally:
        store.finish(keep=keep)


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, list[Tensor]]:
    """A kept file of two rows, at levels 1 and 2."""
    written = states(2)
    with used(disk(tmp_path), keep=True) as store:
        put(store, 0, written[0], level=1)
        put(store, 1, written[1], level=2)
    return tmp_path, written


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_is_written_is_read_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    with used(make(kind, tmp_path)) as store:
        written = [*states(3), *states(2, positions=5)]
        for number, state in enumerate(written):
            put(store, number, state, level=number % 3)
        for number, state in reversed(list(enumerate(written))):
            assert torch.equal(get(store, number), state)  # type: ignore[arg-type]
            assert store.rows[key(number)] == Row(number % 3, tuple(state.shape), torch.float32)  # type: ignore[arg-type]
        store.drop(key(0))
        assert get(store, 0) is None
        assert torch.equal(get(store, 1), written[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_store_holds_its_own_copy(kind: str, tmp_path: Path) -> None:
    with used(make(kind, tmp_path)) as store:
        state = torch.ones(3, WIDTH)
        put(store, 0, state)
        state.zero_()
        assert torch.equal(get(store, 0), torch.ones(3, WIDTH))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_bf16_takes_half_and_rounds(kind: str, tmp_path: Path) -> None:
    with used(make(kind, tmp_path, dtype=torch.bfloat16)) as store:
        (state,) = states(1)
        put(store, 0, state)
        assert torch.equal(get(store, 0), state.bfloat16())  # type: ignore[arg-type]
        assert store.budget.used == state.nbytes // 2
        assert store.rows[key(0)].dtype == torch.float32
    # What is narrow already is never made wider.
    assert RamStore(Budget(1), torch.float32).kept_dtype(torch.float16) == torch.float16


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_the_budget_holds_and_the_next_level_takes_the_same_place(
    kind: str, tmp_path: Path
) -> None:
    first, second = states(3), states(3)
    size = first[0].nbytes
    with used(make(kind, tmp_path, limit=2 * size + size // 2)) as store:
        for written, level in ((first, 0), (second, 1)):
            for number, state in enumerate(written):
                put(store, number, state, level)
            assert store.budget.used == 2 * size
            assert [get(store, 2), len(store.rows)] == [None, 2]
            assert torch.equal(get(store, 1), written[1])  # type: ignore[arg-type]
            if kind == "disk":
                assert (tmp_path / "teacher.states").stat().st_size == HEADER_BYTES + 2 * size
        store.drop(key(0))
        put(store, 2, second[2])  # a row that is gone makes room for another
        assert torch.equal(get(store, 2), second[2])  # type: ignore[arg-type]
        assert store.budget.used == 2 * size
        store.clear()
        assert (store.budget.used, len(store.rows)) == (0, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_rows_of_weights_that_have_changed_are_dropped(kind: str, tmp_path: Path) -> None:
    with used(make(kind, tmp_path)) as store:
        store.drop_stale(["a", "b", "c"])
        for level in range(3):
            put(store, level, torch.ones(1, WIDTH), level)
        store.drop_stale(["a", "b", "changed"])
        assert set(store.rows) == {key(0), key(1)}
        put(store, 2, torch.ones(1, WIDTH), 2)
        store.drop_stale(["a", "b", "changed"])
        assert len(store.rows) == 3


def test_a_kept_file_is_read_again_and_goes_when_it_is_no_longer_kept(kept: Any) -> None:
    place, written = kept
    assert set(contents(place)) == {"teacher.states", "teacher.json"}
    with used(disk(place)) as store:
        assert store.budget.used == sum(state.nbytes for state in written)
        assert [store.rows[key(n)].level for n in (0, 1)] == [1, 2]
        for number, state in enumerate(written):
            assert torch.equal(get(store, number), state)
        (more,) = states(1)
        put(store, 7, more)
        put(store, 0, more, level=2)
        assert torch.equal(get(store, 7), more)
        assert torch.equal(get(store, 1), written[1])
    assert contents(place) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"weights": ["w0", "w1", "other"]},
            "entering block 2 from other weights than the teacher",
        ),
        ({"dtype": torch.bfloat16}, "has dtype='float32', and this run 'bfloat16'"),
        ({"d_state": 8}, "has d_state=4, and this run 8"),
        ({"model": "student"}, "has model='teacher', and this run 'student'"),
        ({"precision": "bf16"}, "has precision='fp32', and this run 'bf16'"),
        ({"more": 1}, "has more=None, and this run 1"),
    ],
)
def test_a_kept_file_of_something_else_is_refused(
    kept: Any, changes: dict[str, Any], words: str
) -> None:
    place, _ = kept
    before = contents(place)
    with pytest.raises(CheckpointError, match="teacher.states has ") as error:
        disk(place, **changes)
    assert words in error.value.cause
    assert str(place) in error.value.remedy
    assert contents(place) == before


def test_weights_of_levels_that_are_not_there_do_not_matter(kept: Any) -> None:
    place, written = kept
    with used(disk(place, weights=["other", "w1", "w2"])) as store:
        assert torch.equal(get(store, 0), written[0])


@pytest.mark.parametrize("format_version", [0, 2, "1"])
def test_another_format_is_refused(kept: Any, format_version: object) -> None:
    place, _ = kept
    path = place / "teacher.json"
    index = json.loads(path.read_text())
    index["header"]["format"] = format_version
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has format="):
        disk(place)


def test_every_truncation_is_refused(kept: Any) -> None:
    place, _ = kept
    whole = (place / "teacher.states").read_bytes()
    index = (place / "teacher.json").read_bytes()
    for size in (0, 1, 40, HEADER_BYTES - 1, *range(HEADER_BYTES, len(whole))):
        (place / "teacher.states").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            disk(place)
    (place / "teacher.states").write_bytes(whole)
    for size in range(len(index)):
        (place / "teacher.json").write_bytes(index[:size])
        with pytest.raises(CheckpointError):
            disk(place)


def test_foreign_and_missing_files_are_refused(kept: Any) -> None:
    place, _ = kept
    for name in ("teacher.states", "teacher.json"):
        before = (place / name).read_bytes()
        for content in (b"", os.urandom(9000), b"[]", b"null", b"{}", b"x" * 9000):
            (place / name).write_bytes(content)
            with pytest.raises(CheckpointError, match="damaged|cannot be read|has format=None"):
                disk(place)
        (place / name).write_bytes(before)
    (place / "teacher.states").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        disk(place)


@pytest.mark.parametrize("name", ["teacher.states", "teacher.json"])
@pytest.mark.parametrize("flip", [1, 16])
def test_no_flipped_byte_gives_a_wrong_state(kept: Any, name: str, flip: int) -> None:
    place, written = kept
    files = contents(place)
    refused = dropped = 0
    for position in range(len(files[name])):
        if name == "teacher.states" and 300 < position < HEADER_BYTES - 9:
            continue  # spaces of the header, all alike
        damaged = bytearray(files[name])
        damaged[position] ^= flip
        (place / name).write_bytes(damaged)
        try:
            store = disk(place)
        except CheckpointError:
            refused += 1
            continue
        for number, (state, level) in enumerate(zip(written, (1, 2), strict=True)):
            row, found = store.rows.get(key(number)), get(store, number)
            dropped += found is None
            assert found is None or torch.equal(found, state)
            assert found is None or (row is not None and row.level == level)
        store.close()
    rows = sum(state.nbytes for state in written)
    if name == "teacher.states":
        # A space of the header that becomes another white space is no damage.
        assert dropped == rows
        assert refused > 100
    else:
        assert refused + dropped >= len(files[name]) - 20


def test_a_damaged_row_is_said_once_and_its_slot_used_again(
    kept: Any, caplog: pytest.LogCaptureFixture
) -> None:
    place, written = kept
    path = place / "teacher.states"
    with used(disk(place)) as store:
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:HEADER_BYTES] + bytes(size - HEADER_BYTES))
        assert [get(store, 0), get(store, 1)] == [None, None]
        (warning,) = [record.getMessage() for record in caplog.records]
        assert str(path) in warning
        assert "differs from its checksum; it is dropped and computed from its tokens" in warning
        for number, state in enumerate(written):
            put(store, number, state)
            assert torch.equal(get(store, number), state)
        assert path.stat().st_size == size


def test_a_file_cut_short_while_open_gives_no_wrong_state(tmp_path: Path) -> None:
    first, second = states(2)
    with used(disk(tmp_path)) as store:
        put(store, 0, first)
        put(store, 1, second)
        os.truncate(tmp_path / "teacher.states", HEADER_BYTES + first.nbytes + 5)
        assert torch.equal(get(store, 0), first)  # type: ignore[arg-type]
        assert get(store, 1) is None
        put(store, 1, second)
        assert torch.equal(get(store, 1), second)  # type: ignore[arg-type]


def test_a_full_disk_keeps_what_fits_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    written, later = states(5), states(5)
    size = written[0].nbytes
    with used(disk(tmp_path), keep=True) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_BYTES + 2 * size + 7, before[1]))
        try:
            for number, state in enumerate(written):
                put(store, number, state)
            for number, state in enumerate(later[:2]):  # in place there is still room
                put(store, number, state, level=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert len(store.rows) == 2
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "computed for every batch" in caplog.text
    with used(disk(tmp_path)) as store:
        assert torch.equal(get(store, 0), later[0])  # type: ignore[arg-type]
        assert torch.equal(get(store, 1), later[1])  # type: ignore[arg-type]


def test_a_leftover_without_an_index_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "teacher.states").write_bytes(b"of a run that was killed" * 1000)
    with used(disk(tmp_path)) as store:
        assert store.rows == {}
        assert (tmp_path / "teacher.states").stat().st_size == HEADER_BYTES


def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="Cannot write"):
        disk(tmp_path / "file")


def test_an_index_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = disk(tmp_path)
    put(store, 0, torch.ones(3, WIDTH))
    (tmp_path / "teacher.json").mkdir()
    (tmp_path / "teacher.json" / "mine").write_text("")
    with pytest.raises(CheckpointError):
        disk(tmp_path)
    store.index_path = tmp_path / "nowhere" / "teacher.json"
    store.finish(keep=True)
    assert "the states cannot be kept: Cannot write" in caplog.text
    assert not (tmp_path / "teacher.states").exists()


def test_an_index_older_than_its_file_gives_no_wrong_state(kept: Any) -> None:
    place, written = kept
    store = disk(place)
    put(store, 0, states(1)[0], level=2)  # and then the process is killed
    store.close()
    with used(disk(place)) as again:
        assert get(again, 0) is None
        assert torch.equal(get(again, 1), written[1])
