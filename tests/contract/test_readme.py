"""The README does what it says: its Python runs, its commands exist, its links lead somewhere."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from tests.contract.documents import (
    Block,
    commands_in,
    make_targets,
    module_call,
    read_blocks,
    run_block,
)
from tests.contract.source_tree import ROOT

README = ROOT / "README.md"
PAGES = [
    page for page in (README, ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md") if page.is_file()
]
SHELL = ("bash", "sh", "shell", "console")
# Modules that come with Python or with the pinned tools, and have a parser of their own.
FOREIGN = {"pip", "venv", "pytest", "ruff", "mypy"}


def shell_commands() -> list[object]:
    return [
        pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")
        for page in PAGES
        for block in read_blocks(page, *SHELL)
        if block.is_run
        for words in commands_in(block)
    ]


def python_blocks() -> list[Block]:
    return [block for block in read_blocks(README, "python") if block.is_run]


def test_readme_has_code_to_test() -> None:
    assert python_blocks(), "the README shows the Python use"
    targets = {
        target
        for block in read_blocks(README, *SHELL)
        for words in commands_in(block)
        for target in make_targets(words)
    }
    assert {"demo", "test"} <= targets, "the README's first screen shows both commands"


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in python_blocks():
        run_block(block, namespace, README)


@pytest.mark.parametrize("words", shell_commands())
def test_command_exists_and_its_flags_parse(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in make_targets(words):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"no target {target}"
    call = module_call(words)
    if call is None or call[0] in FOREIGN:
        return
    module, arguments = call
    assert importlib.util.find_spec(module), f"no module {module}"
    parser = importlib.import_module(module).build_parser()
    parser.parse_args(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"
