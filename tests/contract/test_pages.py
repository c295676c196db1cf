"""The pages do what they say: Python runs, commands exist, links lead somewhere."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml

from tests.contract.documents import (
    NAMED_CODE,
    Block,
    commands_in,
    headings,
    make_targets,
    module_call,
    prose,
    read_blocks,
    run_block,
)
from tests.contract.source_tree import ROOT

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [
    *(p for p in (README, ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md") if p.is_file()),
    *DOCS,
]
# Whose Python is run as a reader would type it. In other pages it must be Python.
TYPED_IN = (README, ROOT / "docs" / "tutorial.md")
SHELL = ("bash", "sh", "shell", "console")
# Modules that come with Python or with the pinned tools, and have a parser of their own.
FOREIGN = {"pip", "venv", "pytest", "ruff", "mypy", "mkdocs", "jupytext"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def shell_commands() -> list[object]:
    return [
        pytest.param(words, id=f"{name(page)}: {' '.join(words)[:60]}")
        for page in PAGES
        for block in read_blocks(page, *SHELL)
        if block.is_run
        for words in commands_in(block)
    ]


def python_blocks(page: Path) -> list[Block]:
    return [block for block in read_blocks(page, "python") if block.is_run]


def test_readme_has_code_to_test() -> None:
    assert python_blocks(README), "the README shows the Python use"
    targets = {
        target
        for block in read_blocks(README, *SHELL)
        for words in commands_in(block)
        for target in make_targets(words)
    }
    assert {"demo", "test"} <= targets, "the README's first screen shows both commands"


@pytest.mark.parametrize("page", TYPED_IN, ids=name)
def test_python_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace: dict[str, object] = {"__name__": "page"}
    for block in python_blocks(page):
        run_block(block, namespace, page)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_are_python(page: Path) -> None:
    for block in read_blocks(page, "python"):
        ast.parse(block.code, filename=f"{name(page)}:{block.line}")


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
    found = importlib.import_module(module)
    if not hasattr(found, "build_parser"):  # a package that is a command
        found = importlib.import_module(f"{module}.__main__")
    parser = found.build_parser()
    parser.parse_args(arguments)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{name(page)} links to {target}"
        if anchor:
            for slug in (repository_slug, site_slug):
                slugs = {slug(heading) for heading in headings(found)}
                assert anchor in slugs, f"{name(page)} links to {target}, there are {sorted(slugs)}"


def test_every_page_is_in_the_navigation_once() -> None:
    """What the strict build of the site asks too, here without mkdocs."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    # The pages of the API reference are made by docs/site_hooks.py.
    listed = [page for page in named_pages(site["nav"]) if not page.startswith("reference/")]
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in DOCS)


def named_pages(entry: object) -> list[str]:
    """The files of a navigation, however deep they stand."""
    if isinstance(entry, dict):
        entry = list(entry.values())
    return [entry] if isinstance(entry, str) else [p for e in entry for p in named_pages(e)]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "architecture.md"], ids=name)
def test_the_tree_names_what_is_there(page: Path) -> None:
    (tree,) = [block.code for block in read_blocks(page, "") if "distillation/" in block.code]
    files = {path.name for path in ROOT.glob("*.py")}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for package in ("cleangpt", "distillation", "model", "examples", "benchmarks"):
        files |= {path.name for path in (ROOT / package).rglob("*.py")}
        folders |= {path.name for path in (ROOT / package).rglob("*") if path.is_dir()}
    assert set(re.findall(r"\w+\.py\b", tree)) <= files
    assert set(re.findall(r"(\w+)/", tree)) <= folders


def test_where_things_are_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in ("cleangpt", "distillation", "model"):
        folder = ROOT / package
        modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        parts = {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
        unnamed = sorted(part for part in modules | parts if part not in page)
        assert not unnamed, f"docs/architecture.md does not name {unnamed} of {package}/"


def repository_slug(heading: str) -> str:
    """The anchor of a heading where the repository is browsed."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_slug(heading: str) -> str:
    """The anchor that Python-Markdown makes of it."""
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_named_code_exists(page: Path) -> None:
    """``path/file.py::Name.method`` is a definition of that file."""
    for file, qualified in NAMED_CODE.findall(page.read_text(encoding="utf-8")):
        path = next((p for p in (ROOT / file, ROOT / "tests" / file) if p.is_file()), None)
        assert path is not None, f"{name(page)}: no file {file}"
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for part in qualified.split("."):
            inner = [n for n in body if part in defined_names(n)]
            assert inner, f"{name(page)}: {file} has no {qualified}"
            body = getattr(inner[0], "body", [])


def defined_names(node: ast.AST) -> set[str]:
    """What a statement defines: a function, a class, or the names it assigns to."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    """Every page is in the navigation, all links and API entries exist, nothing is from afar."""
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(DOCS)
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)|<link\b[^>]*\bhref=\"([^\"]+)",
            page.read_text(encoding="utf-8"),
        )
        afar = [a or b for a, b in loaded if re.match(r"(https?:)?//", a or b)]
        assert not afar, f"{page.name} loads {afar}"
