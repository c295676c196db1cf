"""Token streams on disk: the same tokens, another key for anything else, and damage is mended."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cleangpt.data import token_cache, windows
from cleangpt.data.token_cache import TokenStream, default_directory, tokenizer_fingerprint
from cleangpt.data.windows import TextDataset, pack_documents
from tests.byte_tokenizer import make_tokenizer
from tests.contract.source_tree import ROOT

TEXTS = ["one two three", "", "four five", "six"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(eos_token="<end>")


@pytest.fixture(autouse=True)
def _short_texts_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "MIN_CHARACTERS", 0)
    token_cache._say_not_kept.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever documents are tokenized."""
    real, made = windows._tokenize, []

    def counted(*arguments: Any) -> TokenStream:
        made.append(1)
        return real(*arguments)

    monkeypatch.setattr(windows, "_tokenize", counted)
    return made


def same(a: TokenStream, b: TokenStream) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_the_second_time_nothing_is_tokenized(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    calls: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = pack_documents(TEXTS, tokenizer)
    with caplog.at_level(logging.INFO):
        first = pack_documents(TEXTS, tokenizer, cache_dir=tmp_path / "new" / "folder")
        assert "Tokens kept" in caplog.text
        second = pack_documents(TEXTS, tokenizer, cache_dir=tmp_path / "new" / "folder")
    assert len(calls) == 2
    assert same(plain, first)
    assert same(plain, second)
    (path,) = tmp_path.rglob("*.*")
    assert caplog.messages[-1] == f"Tokens of 4 documents from the cache at {path}"


@pytest.mark.parametrize("packed", [True, False])
def test_a_data_set_is_the_same_from_the_cache(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, packed: bool
) -> None:
    plain = TextDataset(TEXTS, tokenizer, 4, packed=packed)
    for _ in range(2):
        kept = TextDataset(TEXTS, tokenizer, 4, packed=packed, cache_dir=tmp_path)
        assert kept.fingerprint == plain.fingerprint
        assert kept.num_documents == plain.num_documents == 3
        assert [w.tolist() for w in kept.windows] == [w.tolist() for w in plain.windows]


def test_short_texts_are_not_kept(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "MIN_CHARACTERS", 100)
    pack_documents(["a" * 99], tokenizer, cache_dir=tmp_path)
    assert not any(tmp_path.iterdir())
    pack_documents(["a" * 99, "b"], tokenizer, cache_dir=tmp_path)
    assert any(tmp_path.iterdir())


def lower_case() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(eos_token="<end>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_a_token_more() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(eos_token="<end>")
    tokenizer.add_tokens(["two"])
    return tokenizer


@pytest.mark.parametrize(
    ("texts", "make"),
    [
        ([*TEXTS, "seven"], lambda: make_tokenizer(eos_token="<end>")),
        (["one two", " three", "", "four five", "six"], lambda: make_tokenizer(eos_token="<end>")),
        (TEXTS, make_tokenizer),
        (TEXTS, lambda: make_tokenizer(eos_token="<start>")),
        (TEXTS, lambda: make_tokenizer(adds_bos=True, eos_token="<end>")),
        (TEXTS, lambda: make_tokenizer(eos_token="<end>", split_special_tokens=True)),
        (TEXTS, lower_case),
        (TEXTS, with_a_token_more),
    ],
)
def test_whatever_matters_has_a_key_of_its_own(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    calls: list[int],
    texts: list[str],
    make: Callable[[], PreTrainedTokenizerFast],
) -> None:
    pack_documents(TEXTS, tokenizer, cache_dir=tmp_path)
    pack_documents(texts, make(), cache_dir=tmp_path)
    assert len(calls) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_another_way_of_packing_has_another_key(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_documents(TEXTS, tokenizer, cache_dir=tmp_path)
    monkeypatch.setattr(windows, "_PACKING_VERSION", -1)
    pack_documents(TEXTS, tokenizer, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_does_not_matter_changes_no_fingerprint() -> None:
    used = make_tokenizer(eos_token="<end>", pad_token="<end>")
    used(["a", "bcd"], padding="max_length", max_length=5, truncation=True)
    fresh = make_tokenizer(eos_token="<end>", pad_token="<end>")
    assert tokenizer_fingerprint(used) == tokenizer_fingerprint(fresh)


def test_a_slow_tokenizer_is_known_by_its_files(tmp_path: Path, calls: list[int]) -> None:
    one, other = ByT5Tokenizer(extra_ids=3), ByT5Tokenizer(extra_ids=4)
    assert not one.is_fast
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(ByT5Tokenizer(extra_ids=3))
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
    first = pack_documents(TEXTS, one, cache_dir=tmp_path)
    assert same(first, pack_documents(TEXTS, one, cache_dir=tmp_path))
    assert len(calls) == 1


class OfTheUser(PreTrainedTokenizerFast):
    """Its code could change without any of its files."""


def test_a_tokenizer_that_cannot_be_known_is_not_cached(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OfTheUser(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    assert same(pack_documents(TEXTS, own, cache_dir=tmp_path), pack_documents(TEXTS, own))

    def refuse(*_: Any) -> None:
        raise NotImplementedError

    slow = ByT5Tokenizer(extra_ids=3)
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", refuse)
    pack_documents(TEXTS, slow, cache_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def of_another_format(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("tokens", "starts")}
        about = file.metadata()
    save_file(tensors, path, metadata={**about, "format": "0"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip_a_bit, "checksum"),
        (of_another_format, "checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"no tensors at all, just words"), "cannot be read"),
        (lambda path: save_file({"tokens": torch.zeros(3)}, path), "cannot be read"),
        (lambda path: save_file({"tokens": torch.zeros(3), "starts": torch.zeros(1)}, path), "sum"),
    ],
)
def test_a_damaged_file_is_made_again(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    calls: list[int],
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], object],
    words: str,
) -> None:
    plain = pack_documents(TEXTS, tokenizer, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    spoil(path)
    assert same(pack_documents(TEXTS, tokenizer, cache_dir=tmp_path), plain)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert words in warning.getMessage()
    assert str(path) in warning.getMessage()
    assert same(pack_documents(TEXTS, tokenizer, cache_dir=tmp_path), plain)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_one_warning(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = pack_documents(TEXTS, tokenizer)
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):
        assert same(pack_documents(TEXTS, tokenizer, cache_dir=tmp_path / "file"), plain)
        assert same(pack_documents(TEXTS, tokenizer, cache_dir=tmp_path / "file" / "in"), plain)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [str(tmp_path / "file") in line and "not kept" in line for line in said] == [True, True]


def test_a_full_disk_leaves_nothing_behind(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def half_a_file(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise token_cache.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(token_cache, "save_file", half_a_file)
    plain = pack_documents(TEXTS, tokenizer)
    assert same(pack_documents(TEXTS, tokenizer, cache_dir=tmp_path), plain)
    assert "No space left" in caplog.text
    assert not any(tmp_path.iterdir())


def test_a_writer_that_is_overtaken_spoils_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one process is half through its file, another reads, writes and finishes its own."""
    plain = pack_documents(TEXTS, tokenizer)
    real = token_cache.save_file

    def slowly(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        monkeypatch.setattr(token_cache, "save_file", real)
        for _ in range(2):
            assert same(pack_documents(TEXTS, tokenizer, cache_dir=tmp_path), plain)
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(token_cache, "save_file", slowly)
    assert same(pack_documents(TEXTS, tokenizer, cache_dir=tmp_path), plain)
    assert same(pack_documents(TEXTS, tokenizer, cache_dir=tmp_path), plain)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


PROCESS = """
import sys
from pathlib import Path
from cleangpt.data import token_cache, windows
from tests.byte_tokenizer import make_tokenizer

token_cache.MIN_CHARACTERS = 0
tokenizer = make_tokenizer(eos_token="<end>")
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    texts = [f"document {number} " * 500] * 4
    kept, _ = windows.pack_documents(texts, tokenizer, cache_dir=Path(sys.argv[1]))
    assert kept.tolist() == windows.pack_documents(texts, tokenizer).tokens.tolist()
"""


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        assert "damaged" not in errors
        assert "cannot be read" not in errors
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] * 20


def test_where_streams_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLEANGPT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "own" / "tokens"
    monkeypatch.delenv("CLEANGPT_CACHE")
    assert default_directory() == tmp_path / "xdg" / "cleangpt" / "tokens"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_directory() == tmp_path / "home" / ".cache" / "cleangpt" / "tokens"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_directory() is None
