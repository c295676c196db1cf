"""The house rules that no linter has: who imports whom, how long things are, what is not called."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.contract.source_tree import (
    LEAF_MODULES,
    OURS,
    ROOT,
    SourceFile,
    belongs_to,
    imports_of,
    known_modules,
    parse,
    shipped_files,
    source_files,
)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# The first row that a module belongs to says what of ours it may import. Design: imports point one
# way, training code never sees a concrete student, and the leaves know nothing outside themselves.
ALLOWED_IMPORTS: tuple[tuple[str, frozenset[str]], ...] = (
    ("config_distillation", frozenset()),
    ("stitching_layers", frozenset()),
    ("model", frozenset({"model"})),
    ("cleangpt", frozenset({"cleangpt"})),
    ("distillation.losses", frozenset({"distillation.losses"})),
    ("distillation.evaluation", frozenset({"distillation", "cleangpt", "model", *LEAF_MODULES})),
    ("distillation.export", frozenset({"distillation", "cleangpt", "model", *LEAF_MODULES})),
    ("distillation.commands", frozenset({"distillation", "cleangpt", "model", *LEAF_MODULES})),
    ("distillation", frozenset({"distillation", "cleangpt", *LEAF_MODULES})),
    ("examples", frozenset(OURS) - {"tests", "benchmarks"}),
    ("benchmarks", frozenset(OURS) - {"tests"}),
    ("tests", frozenset(OURS)),
)

# Training must not reach the evaluation, which may import the students.
FORBIDDEN_PAIRS = (
    ("distillation.trainers", "distillation.evaluation"),
    ("distillation.trainers", "distillation.commands"),
    ("distillation.distillation_trainer", "distillation.commands"),
)

MAY_PRINT = (
    "examples/",
    "benchmarks/",
    "cleangpt/cli.py",
    "cleangpt/builtin/train.py",
    "distillation/commands/",
    "distillation/evaluation/evaluate_distilled_model.py",
    "distillation/report/__main__.py",
    "distillation/evaluation/lm_eval.py",
    "distillation/export/command.py",
)
GRAB_BAGS = {"util", "utils", "helper", "helpers", "common", "misc", "tools", "stuff"}
GRAB_BAGS_OF_THE_TUTORIAL = {"distillation/utils"}


def files(selection: list[SourceFile] | tuple[SourceFile, ...]) -> list[object]:
    return [pytest.param(file, id=file.name) for file in selection]


def allowed_for(module: str) -> frozenset[str]:
    for package, allowed in ALLOWED_IMPORTS:
        if belongs_to(module, package):
            return allowed
    raise AssertionError(f"{module} has no row in ALLOWED_IMPORTS")


@pytest.mark.parametrize("file", files(source_files()))
def test_imports_follow_the_table(file: SourceFile) -> None:
    allowed = allowed_for(file.module)
    wrong = [
        f"line {found.line}: {found.module}"
        for found in imports_of(file)
        if any(belongs_to(found.module, ours) for ours in OURS)
        and not any(belongs_to(found.module, package) for package in allowed)
    ]
    wrong += [
        f"line {found.line}: {found.module} ({source} must not know {target})"
        for source, target in FORBIDDEN_PAIRS
        if belongs_to(file.module, source)
        for found in imports_of(file)
        if belongs_to(found.module, target)
    ]
    assert not wrong, f"{file.name} may import only {sorted(allowed)} of ours, but: {wrong}"


@pytest.mark.parametrize("file", files([f for f in source_files() if f.package == "model"]))
def test_model_files_travel_alone(file: SourceFile) -> None:
    outside = [
        f"line {found.line}: {found.module}"
        for found in imports_of(file)
        if found.module.split(".")[0] not in {"torch", "transformers", "model"}
        and found.module.split(".")[0] not in sys.stdlib_module_names
    ]
    assert not outside, f"{file.name} travels with every student; not torch/transformers: {outside}"
    absolute = [f for f in imports_of(file) if belongs_to(f.module, "model") and not f.relative]
    assert not absolute, f"{file.name}: inside model/ imports are relative: {absolute}"


def test_the_evaluation_says_who_imports_it() -> None:
    """Each part of distillation that does is named at the head of the package, and no other is."""
    found = {
        file.module.split(".")[1]
        for file in source_files()
        if belongs_to(file.module, "distillation")
        and not belongs_to(file.module, "distillation.evaluation")
        and any(belongs_to(each.module, "distillation.evaluation") for each in imports_of(file))
    }
    told = ast.get_docstring(parse(ROOT / "distillation/evaluation/__init__.py")) or ""
    about, _, _ = told.partition("trainers never")
    assert found == set(re.findall(r"``(\w+)``", about)) - {"distillation"}


def test_no_import_cycles_at_import_time() -> None:
    graph = {
        file.module: {
            found.module
            for found in imports_of(file)
            if found.at_import_time and found.module in known_modules()
        }
        for file in source_files()
    }
    cycles = [start for start in graph if start in reachable(graph, start)]
    assert not cycles, f"modules that import themselves through others: {sorted(cycles)}"


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [*graph.get(start, ())]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo.extend(graph.get(module, ()))
    return seen


@pytest.mark.parametrize("file", files(source_files()))
def test_files_and_functions_are_short(file: SourceFile) -> None:
    lines = len(file.text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{file.name} has {lines} lines, limit {MAX_FILE_LINES}"
    long = {
        f"{node.name} (line {node.lineno})": node.end_lineno - node.lineno + 1
        for node in ast.walk(file.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long, f"{file.name}: functions over {MAX_FUNCTION_LINES} lines: {long}"


@pytest.mark.parametrize("file", files(shipped_files()))
def test_only_commands_print(file: SourceFile) -> None:
    if file.name.startswith(MAY_PRINT):
        return
    lines = [node.lineno for node in calls(file) if ast.unparse(node.func) == "print"]
    assert not lines, f"{file.name} prints on lines {lines}; use logging.getLogger(__name__)"


def calls(file: SourceFile) -> list[ast.Call]:
    return [node for node in ast.walk(file.tree) if isinstance(node, ast.Call)]


def test_no_grab_bag_names() -> None:
    names = {file.name.removesuffix(".py") for file in source_files()}
    folders = {name.rsplit("/", 1)[0] for name in names if "/" in name}
    wrong = {name for name in names | folders if name.rsplit("/", 1)[-1] in GRAB_BAGS}
    assert wrong <= GRAB_BAGS_OF_THE_TUTORIAL, f"say what it holds: {sorted(wrong)}"


def tracked_texts() -> list[object]:
    others = [ROOT / name for name in ("pyproject.toml", "Makefile", "constraints.txt", ".ci/run")]
    return [
        pytest.param(path, id=path.relative_to(ROOT).as_posix())
        for path in [*others, *(file.path for file in source_files())]
    ]


@pytest.mark.parametrize("path", tracked_texts())
def test_sources_are_ascii_and_finished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    foreign = [number for number, line in enumerate(lines, 1) if not line.isascii()]
    assert not foreign, f"{path.name}: characters outside ASCII on lines {foreign}"
    # The brackets keep this line from matching itself.
    unfinished = re.compile("TO[D]O|FIX[M]E|/hom[e]/[a-z]+/|/roo[t]/|/tm[p]/[a-z_]+[/.]")
    marks = [
        f"line {n}: {line.strip()}" for n, line in enumerate(lines, 1) if unfinished.search(line)
    ]
    assert not marks, f"{path.name}: unfinished places or paths of one machine: {marks}"


@pytest.mark.parametrize("file", files(source_files()))
def test_shape_annotations_stay_real_objects(file: SourceFile) -> None:
    modules = {found.module for found in imports_of(file)}
    assert not {"__future__", "jaxtyping"} <= modules, (
        f"{file.name}: postponed annotations hide the shapes from the run-time checker"
    )


@pytest.mark.parametrize("file", files(shipped_files()))
def test_runtime_protocols_have_methods_only(file: SourceFile) -> None:
    """From Python 3.12 on, isinstance does not see a module's submodules as attributes."""
    data = [
        f"{node.name} (line {member.lineno})"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.ClassDef)
        and any("runtime_checkable" in ast.unparse(mark) for mark in node.decorator_list)
        for member in node.body
        if isinstance(member, ast.AnnAssign)
    ]
    assert not data, f"{file.name}: a run-time protocol lists data members: {data}"
