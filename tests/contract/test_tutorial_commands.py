"""The tutorial's commands parse as printed, and run given the model and the data they name."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.documents import commands_in, module_call, read_blocks
from tests.contract.local_hub import save_tiny_gpt2, write_stories
from tests.contract.source_tree import ROOT

TUTORIAL = ROOT.parent / "shared" / "tutorial.md"
pytestmark = pytest.mark.skipif(
    not TUTORIAL.is_file(), reason="the tutorial's text is not beside the repository"
)
DISTIL = "examples.run_distillation_example"
EVALUATE = "distillation.evaluation.evaluate_distilled_model"
# The last value of a flag counts: the printed command stays as it is, and gets smaller.
SMALL_RUN = ["--device", "cpu", "--max_samples", "16", "--epochs_per_block", "1"]
SMALL_RUN += ["--lm_head_epochs", "1", "--batch_size", "8", "--student_n_embd", "24"]
SMALL_EVALUATION = ["--device", "cpu", "--max_samples", "4", "--num_comparison_prompts", "1"]


def printed_commands() -> list[tuple[str, list[str]]]:
    if not TUTORIAL.is_file():
        return []
    calls = [
        module_call(words)
        for block in read_blocks(TUTORIAL, "bash")
        for words in commands_in(block)
    ]
    return [call for call in calls if call is not None]


def command(module: str, number: int = -1) -> list[str]:
    return [arguments for name, arguments in printed_commands() if name == module][number]


def test_the_three_commands_are_found() -> None:
    assert [module for module, _ in printed_commands()] == [EVALUATE, DISTIL, EVALUATE]


@pytest.mark.parametrize(("module", "arguments"), printed_commands())
def test_flags_parse(module: str, arguments: list[str]) -> None:
    settings = importlib.import_module(module).build_parser().parse_args(arguments)
    given = dict(itertools.pairwise(arguments))
    assert str(getattr(settings, "max_samples", None)) == given["--max_samples"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("commands")
    save_tiny_gpt2(place / "gpt2")
    write_stories(place / "roneneldan" / "TinyStories", column="text")
    return place


def run(module: str, arguments: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a person runs it, in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.fixture(scope="module")
def distilled(workplace: Path) -> subprocess.CompletedProcess[str]:
    return run(DISTIL, [*command(DISTIL), *SMALL_RUN], workplace)


def test_complete_example_distils(
    distilled: subprocess.CompletedProcess[str], workplace: Path
) -> None:
    assert distilled.returncode == 0, distilled.stderr[-3000:]
    output = workplace / "distilled_factored_gpt2"
    assert (output / "student_model_final_distilled.pt").is_file()
    assert (output / "manifest.json").is_file()


def test_only_text_column_is_taken_and_named(distilled: subprocess.CompletedProcess[str]) -> None:
    """The command asks for "story"; the data has one text column, called "text"."""
    said = distilled.stdout + distilled.stderr
    lines = [line for line in said.splitlines() if "story" in line and "text" in line]
    assert lines, said[-2000:]


def test_several_text_columns_are_listed(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "gpt2").symlink_to(workplace / "gpt2")
    write_stories(
        tmp_path / "roneneldan" / "TinyStories", column="title", extra_columns=("summary",)
    )
    done = run(DISTIL, [*command(DISTIL), *SMALL_RUN], tmp_path)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "title" in done.stderr
    assert "summary" in done.stderr
    assert "Traceback" not in done.stderr


def test_distilled_model_is_evaluated(
    distilled: subprocess.CompletedProcess[str], workplace: Path
) -> None:
    assert distilled.returncode == 0, distilled.stderr[-3000:]
    done = run(EVALUATE, [*command(EVALUATE), *SMALL_EVALUATION], workplace)
    assert done.returncode == 0, done.stderr[-3000:]
    written = workplace / "distilled_factored_gpt2" / "evaluation"
    reports = {path.suffix for path in written.iterdir()}
    assert {".json", ".md", ".html", ".png"} <= reports
    for path in written.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))


def test_command_builds_what_get_model_class_says(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student registered in the example's own factory function is the one that trains."""
    from examples import run_distillation_example as example
    from model.model_vanilla_distillation import VanillaTransformerModelDistillation

    built: list[str] = []

    class MyCustomTransformerModelDistillation(VanillaTransformerModelDistillation):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            built.append(type(self).__name__)

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(
        example, "get_model_class", lambda name: MyCustomTransformerModelDistillation
    )
    target = ["--output_dir", str(tmp_path / "custom"), "--student_model_type", "Vanilla"]
    example.main([*command(DISTIL), *SMALL_RUN, *target])
    assert built, "main must look get_model_class up in its own module"


@pytest.mark.slow
def test_cuda_without_a_gpu_says_what_to_do(workplace: Path, tmp_path: Path) -> None:
    """The printed command asks for "cuda"."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    # Elsewhere than the runs before it: a used folder is refused before the device is.
    target = ["--output_dir", str(tmp_path / "cuda")]
    done = run(DISTIL, [*command(DISTIL), *target], workplace)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "--device cpu" in done.stderr
    assert "Traceback" not in done.stderr
