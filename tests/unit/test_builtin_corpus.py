import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from cleangpt.builtin import corpus
from cleangpt.builtin.corpus import SPLITS, Document, builtin_documents, builtin_texts
from cleangpt.errors import EnvironmentProblem, UsageError


def test_documents_are_split_without_overlap() -> None:
    names = {split: set() for split in SPLITS}
    for document in builtin_documents():
        names[document.split].add(document.name)
    assert not names["train"] & names["validation"]
    assert not names["train"] & names["test"]
    assert not names["validation"] & names["test"]
    assert sum(len(group) for group in names.values()) == len(builtin_documents())
    assert sum(len(builtin_texts(split)) for split in SPLITS) == len(builtin_documents())


def test_the_corpus_is_about_two_megabytes_in_about_90_5_5() -> None:
    sizes = {split: sum(len(text.encode()) for text in builtin_texts(split)) for split in SPLITS}
    total = sum(sizes.values())
    assert 1_200_000 < total < 3_500_000
    assert 0.82 < sizes["train"] / total < 0.95
    assert sizes["validation"] > 50_000
    assert sizes["test"] > 50_000


def test_no_long_run_of_test_words_was_seen_in_training() -> None:
    def runs(texts: list[str]) -> set[tuple[str, ...]]:
        found = set()
        for text in texts:
            words = text.split()
            found.update(tuple(words[i : i + 20]) for i in range(len(words) - 19))
        return found

    seen = runs(builtin_texts("train"))
    for split in ("validation", "test"):
        held_out = runs(builtin_texts(split))
        assert len(held_out & seen) < 0.02 * len(held_out)


def test_the_split_is_a_function_of_the_name() -> None:
    assert Document("library/json", "a").split == Document("library/json", "b").split
    draws = [Document(f"name {i}", "").split for i in range(4000)]
    assert 0.88 < draws.count("train") / 4000 < 0.92
    assert 0.04 < draws.count("validation") / 4000 < 0.06


def test_texts_are_clean() -> None:
    for document in builtin_documents():
        assert document.text == document.text.strip()
        assert "\n\n\n" not in document.text
        assert "\r" not in document.text
        assert len(document.text) >= corpus.SHORTEST_DOCUMENT


@pytest.mark.slow
def test_another_process_gathers_the_same_text() -> None:
    code = "from cleangpt.builtin import corpus; print(corpus.corpus_fingerprint())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout.strip() == corpus.corpus_fingerprint()


def test_gathering_imports_no_library_module_it_reads() -> None:
    code = (
        "import sys; from cleangpt.builtin import builtin_texts; builtin_texts('train');"
        "print([m for m in ('antigravity', 'turtle', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no split 'dev'.*\n.*train, validation, test"):
        builtin_texts("dev")


def test_docstrings_come_in_source_order_under_qualified_names(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text(
        '"""The package\'s own words."""\n'
        "class Box:\n"
        '    """A box of many things.\n\n    With a lid."""\n'
        "    def open(self):\n"
        '        """Open the box slowly."""\n'
        "if True:\n"
        "    async def wait():\n"
        '        """Wait for the box."""\n'
        "def silent(): pass\n"
        "def terse():\n"
        '    """Deprecated."""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "support.py").write_text('"""A docstring of a test module."""')
    (tmp_path / "broken.py").write_text('"""A docstring that cannot be parsed."""\ndef :')
    (tmp_path / "latin.py").write_bytes(b'"""A docstring in another encoding \xe9."""')
    (document,) = corpus._library_documents(tmp_path)
    assert document.name == "library/package"
    assert document.text == (
        "package\nThe package's own words.\n\n"
        "package.Box\nA box of many things.\n\nWith a lid.\n\n"
        "package.Box.open\nOpen the box slowly.\n\n"
        "package.wait\nWait for the box."
    )


def test_missing_sources_give_a_smaller_corpus(tmp_path: Path) -> None:
    assert list(corpus._library_documents(tmp_path / "absent")) == []


def test_a_python_without_any_text_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_topic_documents", list)
    monkeypatch.setattr(corpus, "_library_documents", lambda folder: [])
    with pytest.raises(EnvironmentProblem, match="--dataset_name"):
        builtin_documents.__wrapped__()


def test_a_reworded_paragraph_is_a_repeat_and_a_short_one_is_not() -> None:
    claimed: set[str] = set()
    first = (
        "Join two or more pathname components, inserting a slash as needed between them.\n\nUse:"
    )
    assert corpus._without_repeats(first, claimed) == first
    again = (
        "Join two or more pathname\n   components, inserting a slash as needed (since 3.2)!\n\nUse:"
    )
    assert corpus._without_repeats(again, claimed) == "Use:"


def test_cleaning_removes_indentation_rules_and_control_characters() -> None:
    text = "Title.\n\n    *****\n    A line.  \n      \x08Another.\n\n\n\n    - - -\n    -----\n"
    assert corpus._clean(text) == "Title.\n\nA line.\n  Another.\n\n- - -"


def test_the_fingerprint_covers_names_and_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "builtin_documents", lambda: (Document("a", "b"),))
    assert corpus.corpus_fingerprint() == hashlib.sha256(b"a\0b\0").hexdigest()
