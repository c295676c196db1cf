"""Data that cannot be used: files, names and the hub."""

import time
from pathlib import Path
from typing import Any

import pytest

from cleangpt.data import local_files
from cleangpt.data.text_sources import load_texts
from cleangpt.errors import CleanGPTError, EnvironmentProblem, InputError, UsageError


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"a.jsonl line 2: a list where an object"),
        ("a.json", b'[{"text": "a"},\n{]', r"a.json line 2: not valid JSON"),
        ("a.json", b"[1, 2]", r"a.json line 1: not an array of objects"),
        ("a.txt", b"fine\ncaf\xe9\n", r"a.txt line 2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'\n\n{"text": "caf\xe9"}\n', r"a.jsonl line 3: byte 0xe9"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a.csv line 3: 3 values under 2 column names"),
        ("a.csv", b'a,b\n1,"2\n', r"a.csv line \d: unexpected end of data"),
        ("a.parquet", b"PAR1 not really", r"a.parquet is not a readable parquet file"),
        ("a.txt", b"", "has no rows"),
        ("a.txt", b" \n\n ", "has no rows"),
        ("a.jsonl", b"", "has no rows"),
        ("a.json", b"", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"text\n", "has no rows"),
        ("a.pdf", b"x", "ends in .pdf, which is not a known format"),
    ],
)
def test_damaged_files(tmp_path: Path, file: str, content: bytes, words: str) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_texts(str(path))
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 2


def test_a_folder_without_text_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no file that ends in \.txt"):
        load_texts(str(tmp_path))


def test_a_typo_in_a_path_names_the_neighbour(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("x")
    with pytest.raises(InputError, match=r"no file or folder.*\nDid you mean .*stories.txt\?"):
        load_texts(str(tmp_path / "storeis.txt"))
    for name in ("./nope", "nope.jsonl", "a/b/c", "two words", ""):
        with pytest.raises(InputError, match="no file or folder"):
            load_texts(name)


def test_configuration_of_what_has_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("x")
    for name in ("builtin", str(tmp_path / "stories.txt")):
        with pytest.raises(UsageError, match=r"--dataset_config_name raw cannot act"):
            load_texts(name, config_name="raw")


def test_builtin_text() -> None:
    source = load_texts("builtin", split="validation", max_samples=4)
    assert len(source.texts) == 4
    assert source.notes == ()
    said = load_texts("builtin", split="test", text_column="story", max_samples=1).notes
    assert "continuing with 'text'" in said[0]


# `datasets` ---------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An endpoint that refuses connections."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_hub")
def test_unreachable_hub_fails_at_once_with_both_remedies() -> None:
    started = time.monotonic()
    with pytest.raises(EnvironmentProblem) as caught:
        load_texts("owner/no-such-stories")
    assert time.monotonic() - started < 5
    assert "127.0.0.1:9" in caught.value.cause
    assert "local path to --dataset_name" in caught.value.remedy
    assert "cache" in caught.value.remedy


@pytest.mark.usefixtures("no_hub")
def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match="offline mode is on"):
        load_texts("owner/no-such-stories")


def fake_hub(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    import datasets

    from cleangpt.data import hub_texts

    def load_dataset(name: str, config_name: str | None, split: str, streaming: bool) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub_texts, "is_hub_reachable", lambda: True)


def test_a_named_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {"text": ["a", None, " ", "b", "c"], "label": [0, 1, 2, 3, 4], "tags": [["x"]] * 5}
    fake_hub(monkeypatch, datasets.Dataset.from_dict(rows))
    source = load_texts("owner/stories", text_column="story", max_samples=2)
    assert source.texts == ["a", "b"]
    assert source.notes == (
        "there is no column 'story'; continuing with 'text', the only text column",
        "dropped 1 null and 1 blank documents",
    )
    with pytest.raises(InputError, match=r"'label' holds int64, not text.*tags \(list\)"):
        load_texts("owner/stories", text_column="label")


@pytest.mark.parametrize(
    ("outcome", "kind", "words"),
    [
        (
            ValueError("Unknown split \"validation\". Should be one of ['train', 'test']."),
            InputError,
            "has no split 'validation'; its splits are: train, test",
        ),
        (
            ValueError("Bad split: validation. Available splits: ['train']"),
            InputError,
            "its splits are: train",
        ),
        (
            ValueError("Config name is missing. Please pick one among: ['a', 'b']"),
            InputError,
            r"one among: \['a', 'b'\]\n.*--dataset_config_name",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), InputError, "--dataset_name"),
        (ConnectionError("no route"), EnvironmentProblem, "could not be fetched: no route"),
        (FileNotFoundError("doesn't exist on the Hub"), EnvironmentProblem, "doesn't exist"),
    ],
)
def test_refusals_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, outcome: Exception, kind: type[CleanGPTError], words: str
) -> None:
    fake_hub(monkeypatch, outcome)
    with pytest.raises(kind, match=words) as caught:
        load_texts("owner/stories", split="validation")
    assert len(str(caught.value).splitlines()) == 2


def test_local_data_imports_no_datasets_library() -> None:
    assert "datasets" not in vars(local_files)
