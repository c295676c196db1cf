"""The wheel, installed beside nothing else, holds every module and the built-in teacher."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.contract.source_tree import LEAF_MODULES, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PACKAGES = ("cleangpt", "distillation", "model")
IMPORT_EVERYTHING = """
import importlib, pathlib, sys
home = pathlib.Path(sys.argv[1])
for path in sorted(home.rglob("*.py")):
    parts = path.relative_to(home).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(home), (name, module.__file__)
import configparser, contextlib, io
(entries,) = pathlib.Path(sys.argv[2]).glob("*.dist-info/entry_points.txt")
parser = configparser.ConfigParser()
parser.read(entries)
for name, target in parser["console_scripts"].items():
    module, _, function = target.partition(":")
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        code = getattr(importlib.import_module(module), function)()
    assert code == 0 and "usage" in shown.getvalue(), (name, code)
    print("COMMAND", name)
from cleangpt.teacher import load_teacher
teacher = load_teacher("builtin")
print("TEACHER", teacher.name, sum(p.numel() for p in teacher.model.parameters()))
for outside in ("examples", "tests", "benchmarks"):
    try:
        importlib.import_module(outside)
    except ModuleNotFoundError:
        continue
    raise AssertionError(outside + " must not be installed")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder appears in the repository."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", *(f"{m}.py" for m in LEAF_MODULES)):
        shutil.copy(ROOT / name, copy)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(target), str(copy)], check=True, timeout=200)
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_our_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {*PACKAGES, *(f"{module}.py" for module in LEAF_MODULES)}
    assert "cleangpt/builtin/assets/model.safetensors" in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


def test_every_module_imports_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(home)
    about = tmp_path / "about"  # beside the packages, Python would believe them installed
    for metadata in home.glob("*.dist-info"):
        shutil.move(metadata, about / metadata.name)
    # -S keeps the editable install out; the dependencies come in as a plain folder.
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    code = f"import sys; sys.path[:0] = {[str(home), *sorted(libraries)]!r}\n{IMPORT_EVERYTHING}"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(home), str(about)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TEACHER builtin" in done.stdout
    for command in ("distill", "evaluate", "report", "doctor"):
        assert f"COMMAND cleangpt-{command}" in done.stdout
