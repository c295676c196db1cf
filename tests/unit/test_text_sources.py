"""Documents by name: formats, columns, splits and notes."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cleangpt.data.local_files import cut_into_documents
from cleangpt.data.text_sources import cut_splits, load_texts, split_of_file, texts_fingerprint
from cleangpt.errors import InputError, UsageError

STORIES = [f"story number {index}, with a few words" for index in range(40)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a train and a validation file."""
    write_jsonl(tmp_path / "d" / "train.jsonl", [{"text": text} for text in STORIES])
    write_jsonl(tmp_path / "d" / "validation-0.jsonl", [{"text": "held out"}])
    return tmp_path / "d"


def all_texts(name: str | Path, **settings: Any) -> set[str]:
    return {
        text
        for split in ("train", "validation", "test")
        for text in load_texts(str(name), split=split, **settings).texts
    }


# Formats ------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".jsonl", write_jsonl),
        (".json", write_json),
        (".json", write_jsonl),
        (".csv", write_csv),
        (".parquet", write_parquet),
    ],
)
def test_formats_hold_the_same_documents(tmp_path: Path, suffix: str, write: Any) -> None:
    texts = [*STORIES, 'with "quotes", commas\nand a line end', "with \u2028 and \u00e9"]
    path = tmp_path / f"data{suffix}"
    write(path, [{"id": index, "story": text} for index, text in enumerate(texts)])
    assert all_texts(path) == set(texts)
    source = load_texts(str(path))
    assert source.text_column == "story"
    assert "continuing with column 'story', the only text column" in source.notes[0]
    assert source.texts == [text for text in texts if text in set(source.texts)]


def test_json_object_with_one_list(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"version": 1, "data": [{"text": text} for text in STORIES]}))
    assert all_texts(path) == set(STORIES)


def test_a_long_txt_becomes_documents(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {index}. " + "word " * 40 for index in range(200)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(paragraphs).encode())
    documents = all_texts(path)
    joined = "".join(documents)
    assert len(documents) >= 20
    assert all(paragraph.strip() in joined for paragraph in paragraphs)
    assert "\r" not in joined
    assert "\ufeff" not in joined


def test_cutting_prefers_blank_lines_then_lines_then_spaces() -> None:
    assert cut_into_documents("short") == ["short"]
    with_blank_lines = "\n\n".join(["a b c d " * 30] * 4)
    assert all(part.strip("\n").startswith("a b") for part in cut_into_documents(with_blank_lines))
    lines = "".join(f"line {index}\n" for index in range(1000))
    assert all(part.endswith("\n") for part in cut_into_documents(lines))
    words = cut_into_documents("word " * 2000)
    assert len(words) > 20
    assert "".join(words) == "word " * 2000
    assert "".join(cut_into_documents("x" * 5000)) == "x" * 5000


def test_many_txt_files_stay_whole(tmp_path: Path) -> None:
    for index in range(25):
        (tmp_path / f"essay{index:02}.txt").write_text("one\n\ntwo " * 300 + str(index))
    assert len(all_texts(tmp_path)) == 25


def test_mixed_folder_and_hidden_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in STORIES])
    (tmp_path / "b.txt").write_text("a plain text")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "notes.md").write_text("not data")
    assert all_texts(tmp_path) == {*STORIES, "a plain text"}


# Splits -------------------------------------------------------------------------------------------


def test_split_files_are_used(folder: Path) -> None:
    (folder / "README.txt").write_text("about this data")
    source = load_texts(str(folder), split="validation")
    assert source.texts == ["held out"]
    assert source.notes == ("1 files whose names name no split were left out",)
    assert load_texts(str(folder)).texts == STORIES
    with pytest.raises(InputError, match=r"no split 'test'; its splits are: train, validation.\n"):
        load_texts(str(folder), split="test")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.txt", "train"),
        ("train-00001-of-2.parquet", "train"),
        ("valid.csv", "validation"),
        ("dev_1.txt", "validation"),
        ("val/part0.txt", "validation"),
        ("Test01.txt", "test"),
        ("training.txt", None),
        ("contest.txt", None),
        ("text.txt", None),
    ],
)
def test_names_of_splits(path: str, split: str | None) -> None:
    assert split_of_file(Path("d") / path, Path("d")) == split


def test_one_file_is_cut_the_same_way_each_time(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in [*STORIES, STORIES[0]]])
    sources = {
        split: load_texts(str(path), split=split) for split in ("train", "validation", "test")
    }
    parts = {split: set(source.texts) for split, source in sources.items()}
    assert [len(part) for part in parts.values()] == [36, 2, 2]
    assert set.union(*parts.values()) == set(STORIES)
    assert "cut by document into train 37, validation 2, test 2" in sources["train"].notes[-1] or (
        "validation 3" in sources["train"].notes[-1] or "test 3" in sources["train"].notes[-1]
    )
    assert load_texts(str(path)) == sources["train"]
    assert sources["train"].fingerprint == texts_fingerprint(sources["train"].texts)
    assert len({source.fingerprint for source in sources.values()}) == 3


def test_too_few_documents_to_hold_out(tmp_path: Path) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text("one short text")
    assert load_texts(str(path)).texts == ["one short text"]
    with pytest.raises(InputError, match=r"holds 1 documents, too few.*\n.*--dataset_split train"):
        load_texts(str(path), split="test")
    assert cut_splits(["a", "a", "b"]) == {"train": ["a", "a", "b"], "validation": [], "test": []}


@pytest.mark.parametrize("name", ["builtin", "file", "folder"])
def test_unknown_split_lists_the_splits(name: str, folder: Path) -> None:
    name = {"file": str(folder / "train.jsonl"), "folder": str(folder)}.get(name, name)
    with pytest.raises(
        InputError, match=r"no split 'dev'; its splits are: train, validation, test"
    ):
        load_texts(name, split="dev")


def test_max_samples_counts_documents(folder: Path, tmp_path: Path) -> None:
    assert load_texts(str(folder), max_samples=3).texts == STORIES[:3]
    assert load_texts(str(folder), max_samples=0).texts == STORIES
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ["", *STORIES]])
    assert load_texts(str(path), max_samples=5).texts == load_texts(str(path)).texts[:5]
    with pytest.raises(UsageError, match=r"max_samples is -1.\n.*--max_samples"):
        load_texts(str(folder), max_samples=-1)


@pytest.mark.slow
def test_the_first_builtin_documents_are_a_fair_sample() -> None:
    from cleangpt.builtin.corpus import builtin_documents

    kinds = {document.text: document.name.split("/")[0] for document in builtin_documents()}
    first = load_texts("builtin", max_samples=50).texts
    assert {kinds[text] for text in first} == {"library", "topics"}
    everything = load_texts("builtin").texts
    assert first == everything[:50]
    assert sorted(everything) == sorted(
        document.text for document in builtin_documents() if document.split == "train"
    )


# Columns ------------------------------------------------------------------------------------------


def rows_file(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    return str(write_jsonl(tmp_path / "train" / "rows.jsonl", rows).parent.parent)


def test_the_only_text_column_is_used_and_said(tmp_path: Path) -> None:
    name = rows_file(tmp_path, [{"text": "a", "id": 1}, {"text": "b", "id": 2}])
    source = load_texts(name, text_column="story")
    assert (source.texts, source.text_column) == (["a", "b"], "text")
    assert source.notes == (
        "there is no column 'story'; continuing with 'text', the only text column",
    )
    assert load_texts(name).notes == ()


def test_several_candidates_are_listed(tmp_path: Path) -> None:
    name = rows_file(tmp_path, [{"title": "a", "body": "b", "id": 1}])
    for wanted in ("story", None):
        with pytest.raises(InputError) as caught:
            load_texts(name, text_column=wanted)
        assert "2 columns hold text" in caught.value.cause
        for part in ("title (string)", "body (string)", "id (int)"):
            assert part in caught.value.cause
        assert "--dataset_text_column" in caught.value.remedy
    assert load_texts(name, text_column="body").texts == ["b"]


def test_columns_that_are_not_text_are_refused(tmp_path: Path) -> None:
    name = rows_file(tmp_path, [{"text": "a", "id": 1, "tags": ["x"]}])
    with pytest.raises(InputError, match=r"'id' holds int, not text.*\n.*text"):
        load_texts(name, text_column="id")
    with pytest.raises(InputError, match="'tags' holds list, not text"):
        load_texts(name, text_column="tags")
    mixed = rows_file(tmp_path / "mixed", [{"text": "a"}, {"text": 3}])
    with pytest.raises(InputError, match="'text' holds int and string, not text"):
        load_texts(mixed, text_column="text")
    with pytest.raises(InputError, match="0 columns hold text"):
        load_texts(rows_file(tmp_path / "none", [{"id": 1}]))


def test_nulls_and_blanks_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": None}, {"other": 1}, {"text": ""}, {"text": " \n"}]
    source = load_texts(rows_file(tmp_path, rows))
    assert source.texts == ["a"]
    assert source.notes == ("dropped 2 null and 2 blank documents",)


def test_half_surrogates_are_mended(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert load_texts(str(tmp_path)).texts == ["a\ufffdb", "\U0001f600"]


def test_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"text": STORIES})
    one.save_to_disk(str(tmp_path / "one"))
    assert all_texts(tmp_path / "one") == set(STORIES)
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "parts"))
    assert load_texts(str(tmp_path / "parts")).texts == STORIES
    with pytest.raises(InputError, match="its splits are: train"):
        load_texts(str(tmp_path / "parts"), split="validation")
    (tmp_path / "parts" / "dataset_dict.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_texts(str(tmp_path / "parts"))


def test_a_configuration_of_a_local_folder_is_a_folder_inside(tmp_path: Path) -> None:
    for place, word in ((tmp_path, "outer"), (tmp_path / "raw-v1", "inner")):
        place.mkdir(exist_ok=True)
        lines = "".join(f'{{"text": "{word} {i}"}}\n' for i in range(4))
        (place / "train.jsonl").write_text(lines)
    inner = load_texts(str(tmp_path), config_name="raw-v1")
    assert {text.split()[0] for text in inner.texts} == {"inner"}
    outer = load_texts(str(tmp_path), config_name="raw-v2")
    assert {text.split()[0] for text in outer.texts} == {"inner", "outer"}
    assert "no folder 'raw-v2'" in outer.notes[0]
