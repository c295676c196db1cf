"""The house rules that no linter has: who imports whom, how long things are, what is not called."""

import ast
import re
import sys
from collections.abc import Callable, Iterable

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


def wrong_in(files: Iterable[SourceFile], check: Callable[[SourceFile], list[str]]) -> list[str]:
    """What a check finds in any of the files; one test for all, since there are many files."""
    return [f"{file.name}: {found}" for file in files for found in check(file)]


def allowed_for(module: str) -> frozenset[str]:
    for package, allowed in ALLOWED_IMPORTS:
        if belongs_to(module, package):
            return allowed
    raise AssertionError(f"{module} has no row in ALLOWED_IMPORTS")


def test_imports_follow_the_table() -> None:
    assert not wrong_in(source_files(), imports_outside_the_table)


def imports_outside_the_table(file: SourceFile) -> list[str]:
    allowed = allowed_for(file.module)
    wrong = [
        f"line {found.line}: {found.module} (of ours only {sorted(allowed)})"
        for found in imports_of(file)
        if any(belongs_to(found.module, ours) for ours in OURS)
        and not any(belongs_to(found.module, package) for package in allowed)
    ]
    return wrong + [
        f"line {found.line}: {found.module} ({source} must not know {target})"
        for source, target in FORBIDDEN_PAIRS
        if belongs_to(file.module, source)
        for found in imports_of(file)
        if belongs_to(found.module, target)
    ]


def test_model_files_travel_alone() -> None:
    files = [file for file in source_files() if file.package == "model"]
    assert files
    assert not wrong_in(files, imports_that_do_not_travel)


def imports_that_do_not_travel(file: SourceFile) -> list[str]:
    outside = [
        f"line {found.line}: {found.module} (a student takes only torch and transformers along)"
        for found in imports_of(file)
        if found.module.split(".")[0] not in {"torch", "transformers", "model"}
        and found.module.split(".")[0] not in sys.stdlib_module_names
    ]
    return outside + [
        f"line {found.line}: {found.module} (inside model/ imports are relative)"
        for found in imports_of(file)
        if belongs_to(found.module, "model") and not found.relative
    ]


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


def test_files_and_functions_are_short() -> None:
    assert not wrong_in(source_files(), what_is_too_long)


def what_is_too_long(file: SourceFile) -> list[str]:
    lines = len(file.text.splitlines())
    whole = [f"{lines} lines, limit {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    return whole + [
        f"{node.name} (line {node.lineno}) is over {MAX_FUNCTION_LINES} lines"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def test_only_commands_print() -> None:
    """Everything else says ``logging.getLogger(__name__)``."""
    quiet = [file for file in shipped_files() if not file.name.startswith(MAY_PRINT)]
    assert not wrong_in(quiet, prints)


def prints(file: SourceFile) -> list[str]:
    return [
        f"prints on line {node.lineno}"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def test_no_grab_bag_names() -> None:
    names = {file.name.removesuffix(".py") for file in source_files()}
    folders = {name.rsplit("/", 1)[0] for name in names if "/" in name}
    wrong = {name for name in names | folders if name.rsplit("/", 1)[-1] in GRAB_BAGS}
    assert wrong <= GRAB_BAGS_OF_THE_TUTORIAL, f"say what it holds: {sorted(wrong)}"


def test_sources_are_ascii_and_finished() -> None:
    others = [ROOT / name for name in ("pyproject.toml", "Makefile", "constraints.txt", ".ci/run")]
    # The brackets keep this line from matching itself.
    unfinished = re.compile("TO[D]O|FIX[M]E|/hom[e]/[a-z]+/|/roo[t]/|/tm[p]/[a-z_]+[/.]")
    foreign, marks = [], []
    for path in [*others, *(file.path for file in source_files())]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            place = f"{path.relative_to(ROOT)}, line {number}: {line.strip()}"
            if not line.isascii():
                foreign.append(place)
            if unfinished.search(line):
                marks.append(place)
    assert not foreign, f"characters outside ASCII: {foreign}"
    assert not marks, f"unfinished places or paths of one machine: {marks}"


def test_shape_annotations_stay_real_objects() -> None:
    """Postponed annotations would hide the shapes from the run-time checker."""
    hidden = [
        file.name
        for file in source_files()
        if {"__future__", "jaxtyping"} <= {found.module for found in imports_of(file)}
    ]
    assert not hidden


def test_runtime_protocols_have_methods_only() -> None:
    """From Python 3.12 on, isinstance does not see a module's submodules as attributes."""
    assert not wrong_in(shipped_files(), data_of_runtime_protocols)


def data_of_runtime_protocols(file: SourceFile) -> list[str]:
    return [
        f"{node.name} lists a data member (line {member.lineno})"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.ClassDef)
        and any("runtime_checkable" in ast.unparse(mark) for mark in node.decorator_list)
        for member in node.body
        if isinstance(member, ast.AnnAssign)
    ]
