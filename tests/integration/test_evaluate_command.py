"""The evaluation command end to end, on tiny models saved to disk."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cleangpt.cli import run_command
from distillation.evaluation.evaluate_distilled_model import main

Run = Callable[..., int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.evaluation_samples import PROSE, save_run, save_teacher

    root = tmp_path_factory.mktemp("command")
    save_run(root / "run", "Factored")
    save_run(root / "start", "Factored", seed=5)
    save_teacher(root / "teacher")
    (root / "text").mkdir()
    (root / "text" / "test.txt").write_text("\n\n\n".join(PROSE))
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    def call(*flags: str, model: str = "run", **changes: str) -> int:
        options = {
            "--model_path": str(made / model),
            "--teacher_model_name": str(made / "teacher"),
            "--dataset_name": str(made / "text"),
            "--output_dir": str(tmp_path / "out"),
            "--speed_seconds": "0",
            "--device": "cpu",
            **{f"--{name}": value for name, value in changes.items()},
        }
        return run_command(main, [part for pair in options.items() for part in pair] + [*flags])

    return call


def saved(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_the_whole_command(
    run: Run, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        "--generate_comparisons",
        model_type="Factored",
        baseline_path=str(made / "start"),
        num_comparison_prompts="2",
        max_new_tokens="4",
        speed_seconds="0.01",
        block_size="16",
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "Traceback" not in shown.err
    lines = shown.out.splitlines()
    assert lines[0].split()[0] == "model"
    assert [line.split()[0] for line in lines[1:4]] == ["teacher", "student", "baseline"]
    assert "report.html" in shown.out
    result = saved(tmp_path)
    assert [model["role"] for model in result["models"]] == ["teacher", "student", "baseline"]
    assert result["hidden_states"]["stitch"] == "saved"
    assert [b["teacher_block"] for b in result["hidden_states"]["blocks"]] == [0, 2]
    assert len(result["generations"]) == 4
    assert result["data"]["seq_len"] == 16
    assert result["data"]["split"] == "test"
    assert "--model_type Factored" in result["environment"]["command"]
    for name in ("report.html", "report.md", "models.png", "layer_mse.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_checkpoint_and_folder_give_the_same_numbers(run: Run, tmp_path: Path) -> None:
    found: list[Any] = []
    for place in ("run/final", "run/student_model_final_distilled.pt"):
        assert run(model=place) == 0
        found.append(saved(tmp_path))
    assert found[0]["models"][1]["quality"] == pytest.approx(found[1]["models"][1]["quality"])
    assert found[0]["hidden_states"] == found[1]["hidden_states"]


@pytest.mark.slow
def test_the_teacher_as_its_own_student(run: Run, tmp_path: Path) -> None:
    assert run(model="teacher") == 0
    quality = saved(tmp_path)["models"][1]["quality"]
    assert quality["kl_nats"] == 0.0
    assert quality["top1_agreement"] == 1.0
    assert quality["perplexity_ratio"] == 1.0


def test_the_report_goes_beside_the_model(made: Path) -> None:
    argv = [
        "--model_path", str(made / "start" / "student_model_final_distilled.pt"),
        "--teacher_model_name", str(made / "teacher"),
        "--dataset_name", str(made / "text"),
        "--speed_seconds", "0", "--max_tokens", "40",
    ]  # fmt: skip
    main(argv)
    assert (made / "start" / "evaluation" / "report.html").is_file()


def test_numbers_are_printed_where_nothing_can_be_written(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run(output_dir=str(tmp_path / "file" / "out")) == 5
    shown = capsys.readouterr()
    assert "student (Factored)" in shown.out
    assert shown.err.splitlines()[-2].startswith("error: ")
    assert shown.err.splitlines()[-1].startswith("fix: ")


@pytest.mark.slow
def test_prompts_of_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The dog\n\nA <b>student</b>\n")
    flags = {"prompts_file": str(tmp_path / "prompts.txt"), "max_new_tokens": "3"}
    assert run("--generate_comparisons", **flags) == 0
    prompts = [item["prompt"] for item in saved(tmp_path)["generations"]]
    assert prompts == ["The dog", "The dog", "A <b>student</b>", "A <b>student</b>"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "holds no prompt"), (b"\n \n", "no prompt"), (b"\xff\xfe", "UTF-8")],
)
def test_unusable_prompt_files(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert run("--generate_comparisons", prompts_file=str(tmp_path / "prompts.txt")) == 3
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ({"model_type": "SASP"}, 2, "holds a Factored model"),
        ({"model_type": "GPT"}, 2, "invalid choice"),
        ({"stride": "99"}, 2, "--stride 99"),
        ({"batch_sise": "4"}, 2, "--batch_size"),
        ({"temperature": "0"}, 2, "temperature"),
        ({"prompts_file": "x"}, 2, "--generate_comparisons"),
        ({"dataset_split": "nope"}, 3, "nope"),
        ({"model_path": "/nowhere/model.pt"}, 3, "/nowhere/model.pt"),
        ({"baseline_path": "/nowhere/model.pt"}, 3, "--baseline_path"),
    ],
)
def test_refusals_are_two_lines_and_an_exit_code(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, str],
    code: int,
    words: str,
) -> None:
    assert run(**flags) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert shown.err.splitlines()[-2].startswith("error: ")
    assert shown.err.splitlines()[-1].startswith("fix: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--teacher_model_name", "/nowhere/teacher"),
        ("--model_path", "/nowhere/model.pt"),
        ("--baseline_path", "/nowhere/model.pt"),
        ("--dataset_name", "/nowhere/text.txt"),
    ],
)
def test_wrong_names_are_refused_before_torch_is_imported(made: Path, flag: str, name: str) -> None:
    code = (
        "import sys\n"
        "from cleangpt.cli import run_command\n"
        "from distillation.evaluation.evaluate_distilled_model import main\n"
        "code = run_command(main, sys.argv[1:])\n"
        "print(code, [m for m in ('torch', 'transformers') if m in sys.modules])\n"
    )
    flags = ["--model_path", str(made / "run"), flag, name]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "3 []", done.stderr
    assert name in done.stderr


@pytest.mark.slow
def test_threads_are_set_as_asked(run: Run, tmp_path: Path) -> None:
    for count in ("1", "3"):
        assert run(threads=count, block_size="16", max_tokens="40") == 0
        assert saved(tmp_path)["environment"]["threads"] == int(count)


@pytest.mark.parametrize("wanted", ["first", pytest.param("last", marks=pytest.mark.slow)])
def test_blocks_are_compared_with_those_they_learnt_from(
    wanted: str, run: Run, made: Path, tmp_path: Path
) -> None:
    """At the teacher's width there are no stitches that would keep the map."""
    from cleangpt.teacher import load_teacher
    from distillation import DistillationTrainer
    from tests.builders import batches
    from tests.evaluation_samples import student

    teacher = load_teacher(str(made / "teacher"))
    own = DistillationTrainer(
        teacher.model,
        student(n_embd=32),
        teacher.tokenizer,
        batches(1),
        output_dir=tmp_path / "run",
        layer_map=wanted,
        init_from_teacher="layers",
        stitch_equal_widths=False,
    )
    own.train(epochs_per_block=1, lr_per_block=1e-3, train_lm_head=False)
    assert not (tmp_path / "run" / "stitching_layers.safetensors").exists()
    assert run(model_path=str(tmp_path / "run")) == 0
    hidden = saved(tmp_path)["hidden_states"]
    learnt_from = [0, 1] if wanted == "first" else [1, 2]
    assert hidden["stitch"] == "identity"
    assert [block["teacher_block"] for block in hidden["blocks"]] == learnt_from
    assert hidden["hybrids"][-1]["student_block"] == 1
    assert not any("layer map" in note for note in saved(tmp_path)["notes"])
