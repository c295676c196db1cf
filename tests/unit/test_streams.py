"""Documents of a data set that is read as it is needed: the same ones, from any place on."""

import gc
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cleangpt.data.streams import StreamPosition, TextStream, first_texts, open_stream
from cleangpt.data.text_sources import load_texts, split_of_document
from cleangpt.errors import EnvironmentProblem, InputError, UsageError
from tests.unit.test_text_sources import STORIES, write_csv, write_jsonl, write_parquet

MANY = [f"story {index}, of which there are many\nNA" for index in range(1203)]


def write_txt(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "\n\n".join(f"{row['text']} " * (1 + index % 9) for index, row in enumerate(rows))
    path.write_text(text, encoding="utf-8")


WRITERS: dict[str, Callable[..., Any]] = {
    "jsonl": write_jsonl,
    "json": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
    "txt": write_txt,
}


def texts_of(stream: TextStream, place: Any = None) -> list[str]:
    return [text for _, text in stream.documents(place)]


def through_json(place: StreamPosition) -> StreamPosition:
    return StreamPosition(*json.loads(json.dumps(place)))


@pytest.fixture
def _collected(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of a CSV that is not read to its end, `datasets` leaves the file to the garbage collector."""
    yield
    if "csv" not in request.node.name:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.mark.usefixtures("_collected")
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore:Exception ignored in")
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_stream_has_the_documents_of_a_data_set_read_at_once(suffix: str, tmp_path: Path) -> None:
    for part, texts in enumerate((MANY[:1100], ["  ", *MANY[1100:]])):
        WRITERS[suffix](
            tmp_path / f"train [{part}].{suffix}",
            [{"id": index, "text": text} for index, text in enumerate(texts)],
        )
    stream, source = open_stream(str(tmp_path)), load_texts(str(tmp_path))
    found = list(stream.documents())
    assert [text for _, text in found] == source.texts
    assert len(found) > 20
    assert stream.text_column == source.text_column == "text"
    # From a place, the rest; also from a place that was found after going on from one.
    first, second = len(found) // 2, len(found) - 7
    going_on = list(stream.documents(through_json(found[first][0])))
    assert [text for _, text in going_on] == source.texts[first:]
    place = through_json(going_on[second - first][0])
    assert texts_of(open_stream(str(tmp_path)), place) == source.texts[second:]


def test_documents_of_one_file_are_split_by_their_hash(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"story": text} for text in MANY])
    parts = {
        split: texts_of(open_stream(str(path), split=split))
        for split in ("train", "validation", "test")
    }
    assert sorted(text for part in parts.values() for text in part) == sorted(MANY)
    assert 20 < len(parts["validation"]) < 120 > len(parts["test"]) > 20
    assert all(split_of_document(text) == "test" for text in parts["test"])
    # Nearly the same ones as where all documents are known.
    at_once = set(load_texts(str(path), split="test").texts)
    assert len(at_once & set(parts["test"])) > 0.6 * len(at_once)
    notes = open_stream(str(path)).notes
    assert "each document's hash says" in notes[0]
    assert "column 'story'" in notes[1]


def test_a_saved_data_set_is_streamed(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": MANY})}).save_to_disk(
        str(tmp_path / "saved")
    )
    stream = open_stream(str(tmp_path / "saved"))
    found = list(stream.documents())
    assert [text for _, text in found] == MANY
    assert texts_of(stream, found[1150][0]) == MANY[1150:]
    with pytest.raises(InputError, match="no split 'test'"):
        open_stream(str(tmp_path / "saved"), split="test")


def test_a_named_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> Any:
        asked.append((names, settings))
        return datasets.Dataset.from_dict({"text": STORIES}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = open_stream("owner/stories", config_name="en", split="train")
    assert texts_of(stream) == STORIES
    assert asked[0] == (("owner/stories", "en"), {"split": "train", "streaming": True})
    monkeypatch.setattr(datasets.IterableDataset, "iter", lambda *_, **__: broken())
    with pytest.raises(EnvironmentProblem, match="'owner/stories' could not be fetched: gone"):
        texts_of(stream)


def broken() -> Any:
    raise ConnectionError("gone")
    yield


def test_only_as_much_as_is_asked_for_is_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-0.jsonl", [{"text": text} for text in STORIES])
    (tmp_path / "train-1.jsonl").write_text("damaged")
    assert first_texts(open_stream(str(tmp_path)), 5).texts == STORIES[:5]
    assert load_texts(str(tmp_path), max_samples=5, streaming=True).texts == STORIES[:5]
    with pytest.raises(UsageError, match="--max_samples"):
        load_texts(str(tmp_path), streaming=True)


@pytest.mark.usefixtures("_collected")
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore:Exception ignored in")
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"text": "one"}]', "is one JSON array.*\n.*leave --streaming out"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "a.jsonl cannot be read: .*\n.*--streaming"),
        ("a.txt", b"one\n\xff two\n", "a.txt cannot be read: .*utf-8"),
        ("a.jsonl", b'{"id": 1}\n', "0 columns hold text"),
        ("a.jsonl", b"", "has no rows with text"),
        ("a.parquet", b"PAR1 or not", "a.parquet cannot be read"),
        ("a.csv", b"text,n\none,2\ntwo,3,4\n", "a.csv cannot be read"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        texts_of(open_stream(str(tmp_path / name)))
    assert len(str(caught.value).splitlines()) == 2


def test_names_that_have_no_stream_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to stream"):
        open_stream("builtin")
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in STORIES])
    with pytest.raises(InputError, match="no split 'dev'"):
        open_stream(str(tmp_path), split="dev")
