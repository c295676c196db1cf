"""What the architecture tests read: every Python file of ours, parsed, with its imports."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cleangpt", "model", "distillation", "examples", "benchmarks", "tests")
LEAF_MODULES = ("config_distillation", "stitching_layers")
OURS = (*PACKAGES, *LEAF_MODULES)


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, with where it stands."""

    module: str
    line: int
    at_import_time: bool
    relative: bool


@dataclass(frozen=True)
class SourceFile:
    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.module.split(".")[0]

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def source_files() -> tuple[SourceFile, ...]:
    """All Python files of ours, in a fixed order."""
    paths = [ROOT / f"{module}.py" for module in LEAF_MODULES]
    for package in PACKAGES:
        paths.extend(sorted((ROOT / package).rglob("*.py")))
    return tuple(
        SourceFile(path, module_name(path), path.read_text(encoding="utf-8"), parse(path))
        for path in paths
        if path.is_file()
    )


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def shipped_files() -> list[SourceFile]:
    """Everything but the tests."""
    return [file for file in source_files() if file.package != "tests"]


@cache
def known_modules() -> frozenset[str]:
    return frozenset(file.module for file in source_files())


@cache
def imports_of(file: SourceFile) -> list[Import]:
    """Every import of a file; ``from package import module`` counts as that module."""
    found: list[Import] = []
    for node, at_import_time in _walk(file.tree, True):
        if isinstance(node, ast.Import):
            found.extend(
                Import(alias.name, node.lineno, at_import_time, False) for alias in node.names
            )
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(file, node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                module = full if full in known_modules() else base
                found.append(Import(module, node.lineno, at_import_time, node.level > 0))
    return found


def _absolute(file: SourceFile, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = file.module.split(".")
    if file.path.name == "__init__.py":
        parts.append("__init__")
    base = parts[: len(parts) - node.level]
    return ".".join([*base, node.module] if node.module else base)


def _walk(node: ast.AST, at_import_time: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, each with whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        runs = at_import_time and not lazy and not type_only
        yield child, runs
        yield from _walk(child, runs)


def belongs_to(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
