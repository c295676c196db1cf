"""What the site adds to the Markdown: API pages from docstrings, and links into the sources.

A page names code as ``path/file.py::Name``; on the site that becomes a link to the name's entry in
the API reference, so a strict build fails for names that are not there.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("distillation", "model", "cleangpt")
ROOT_MODULES = ("config_distillation", "stitching_layers")
NAMED_CODE = re.compile(
    rf"`((?:(?:{'|'.join(PACKAGES)})/[\w/]+|{'|'.join(ROOT_MODULES)})\.py)::([\w.]+)`"
)
OUTSIDE_LINK = re.compile(r"\]\((\.\./[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add one API page for each package, and the repository's files that pages link to."""
    files.append(api_page(config, "root", list(ROOT_MODULES)))
    for package, modules in modules_by_package().items():
        files.append(api_page(config, package, modules))
    for page in list(files.documentation_pages()):
        for target in {found[0] for found in outside_links(page.content_string, page.src_uri)}:
            name = f"repository/{target}.txt"
            if files.get_file_from_path(name) is None:
                text = (ROOT / target).read_text(encoding="utf-8")
                files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links out of docs/ into ones to the copies, and named code into links to its entry."""
    source = page.file.src_uri
    if source.startswith("reference/"):
        return markdown
    for target, link in outside_links(markdown, source):
        copy = posixpath.relpath(f"repository/{target}.txt", posixpath.dirname(source) or ".")
        markdown = markdown.replace(f"]({link}", f"]({copy}")
    return NAMED_CODE.sub(lambda found: f"[{found[0]}][{identifier(*found.groups())}]", markdown)


def identifier(file: str, name: str) -> str:
    """``a/b.py`` and ``Name`` as ``a.b.Name``."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"{module}.{name}"


def outside_links(markdown: str, source: str) -> list[tuple[str, str]]:
    """Links of a page to files outside docs/: (path from the repository's root, as written)."""
    found = []
    for link in OUTSIDE_LINK.findall(markdown):
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link))
        if not target.startswith(("docs/", "../")):
            found.append((target, link))
    return found


def api_page(config: Any, name: str, modules: list[str]) -> File:
    """The page of one package: every module's docstring, classes and functions."""
    entries = "\n".join(f"::: {module}\n" for module in modules)
    title = " and ".join(modules) if name == "root" else name
    return File.generated(config, f"reference/{name}.md", content=f"# {title}\n\n{entries}")


def modules_by_package() -> dict[str, list[str]]:
    """Every module that is installed, by its package."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            found.setdefault(".".join(parts[:-1]), []).append(module)
    return found
