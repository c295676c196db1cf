"""Data (T11, T12 and T14 of docs/faults.md); the other rows are tested where files are read."""

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from cleangpt.data import token_cache
from cleangpt.data.batches import make_dataloader
from cleangpt.data.text_sources import load_texts
from cleangpt.data.windows import DistillationDataCollator, TextDataset
from cleangpt.errors import EnvironmentProblem
from tests.builders import tiny_student, tiny_teacher
from tests.byte_tokenizer import make_tokenizer
from tests.faults.small_runs import small_trainer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "train.jsonl"
    path.parent.mkdir()
    rows = (json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(300))
    path.write_text("".join(rows))
    return path


@pytest.fixture
def cached(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached file of a data set that only the cache of `datasets` knows."""
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.load_dataset("json", data_files=str(source), split="train")
    (made,) = cache.glob("json/*/*/*/")
    folder = cache / "owner___stories" / "default" / "0.0.0" / "abc"
    shutil.copytree(made, folder)
    (folder / "json-train.arrow").rename(folder / "stories-train.arrow")
    about = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**about, "dataset_name": "stories"}))
    return folder / "stories-train.arrow"


@pytest.mark.parametrize(
    "left", [0.5, *(pytest.param(left, marks=pytest.mark.slow) for left in (0.0, 0.003))]
)
def test_a_cached_file_that_was_cut_short_is_named(left: float, cached: Path) -> None:
    assert len(load_texts("owner/stories").texts) > 200
    content = cached.read_bytes()
    cached.write_bytes(content[: int(left * len(content))])
    with pytest.raises(EnvironmentProblem, match="damaged in the cache") as error:
        load_texts("owner/stories")
    assert "owner___stories" in error.value.remedy
    assert error.value.exit_code == 5


def test_a_cached_file_that_was_cut_short_is_built_again_where_there_is_a_hub(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the library builds from a local file what it would fetch by name."""
    import datasets

    from cleangpt.data import hub_texts

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    build = datasets.load_dataset

    def by_name(name: str, config_name: str | None, split: str, **options: Any) -> Any:
        return build("json", data_files=str(source), split=split, **options)

    monkeypatch.setattr(datasets, "load_dataset", by_name)
    monkeypatch.setattr(hub_texts, "is_hub_reachable", lambda: True)
    whole = load_texts("owner/stories").texts
    (path,) = (tmp_path / "cache").glob("json/*/*/*/json-train.arrow")
    path.write_bytes(path.read_bytes()[:1000])
    assert load_texts("owner/stories").texts == whole
    assert "is damaged in the cache" in caplog.text
    caplog.clear()
    assert load_texts("owner/stories").texts == whole
    assert "damaged" not in caplog.text


def test_what_a_killed_process_left_half_written_goes_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "MIN_CHARACTERS", 0)
    old, new, foreign = (
        tmp_path / name for name in (".a.safetensors.1.tmp", ".b.safetensors.2.tmp", ".notes.tmp")
    )
    for path in (old, new, foreign):
        path.write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    for path in (old, foreign):
        os.utime(path, (yesterday, yesterday))
    # A class from outside of transformers is not cached; this one says that it comes from there.
    tokenizer = make_tokenizer(eos_token="<end>")
    TextDataset(["some text of no length"], tokenizer, 4, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert not old.exists()
    assert new.exists()
    assert foreign.exists()


@pytest.mark.parametrize("shared", [True, False])
def test_held_out_text_that_is_trained_on_is_pointed_out(
    shared: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.utils.data import Subset

    tokenizer = make_tokenizer(eos_token="<end>")
    collator = DistillationDataCollator(tokenizer, 16)
    texts = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(9)]
    train = TextDataset(texts[:6], tokenizer, 16)
    held_out = TextDataset(texts[5:] if shared else texts[6:], tokenizer, 16)
    own = small_trainer(
        tmp_path,
        teacher=tiny_teacher(vocab_size=258),
        student=tiny_student(vocab_size=258),
        data=make_dataloader(train, collator, 4),
        validation_dataloader=make_dataloader(Subset(held_out, range(4)), collator, 4),
        audit_tokens=0,
    )
    with caplog.at_level(logging.WARNING):
        own.train(0, 1e-3, train_lm_head=False)
    found = "of the validation text is in the training text" in caplog.text
    assert found == shared
