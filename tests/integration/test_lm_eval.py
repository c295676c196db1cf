"""EleutherAI's harness on a student and its teacher, and our perplexity beside it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contract.source_tree import ROOT

pytest.importorskip("lm_eval", reason="needs the extra lm-eval, which make test-slow installs")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    from cleangpt.builtin import builtin_teacher_path
    from tests.evaluation_samples import save_run

    folder = save_run(tmp_path_factory.mktemp("harness") / "run", "SASP", vocab_size=2048)
    AutoTokenizer.from_pretrained(builtin_teacher_path()).save_pretrained(folder / "final")
    return folder


def called(module: str, *flags: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(cwd / "hf")}
    return subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def result(run: Path) -> Any:
    flags = ["--model_path", str(run), "--limit", "3", "--device", "cpu"]
    done = called("distillation.evaluation.lm_eval", *flags, cwd=run.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0].split()[-4:-2] == ["teacher", "(builtin)"]
    assert "lm_eval" in (run / "evaluation" / "lm_eval.md").read_text()
    return json.loads((run / "evaluation" / "lm_eval.json").read_text())


def test_its_perplexity_is_ours(result: Any) -> None:
    assert list(result["scores"]) == ["teacher (builtin)", "student (SASP)"]
    for both in result["perplexity_per_token"].values():
        assert both["relative_difference"] < 1e-4
        assert both["num_tokens"] > 100
    for scores in result["scores"].values():
        assert set(scores) == {"cleangpt_text", "cleangpt_cloze"}
        assert 0 <= scores["cleangpt_cloze"]["acc"] <= 1


def test_the_evaluation_itself_agrees_where_its_windows_are_the_same(run: Path) -> None:
    from cleangpt.builtin.corpus import builtin_texts
    from cleangpt.teacher import load_teacher
    from distillation.evaluation import evaluate
    from distillation.evaluation.loading import load_model
    from tests.evaluation_samples import fast_settings

    flags = ["--model_path", str(run), "--limit", "1", "--tasks", "cleangpt_text"]
    flags += ["--device", "cpu", "--output_dir", str(run.parent / "one")]
    done = called("distillation.evaluation.lm_eval", *flags, cwd=run.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((run.parent / "one" / "lm_eval.json").read_text())
    teacher = load_teacher("builtin")
    # The token that begins a text stands before it, and windows do not overlap.
    text = teacher.tokenizer.bos_token + builtin_texts("test")[0]
    context = found["context"]
    own = evaluate(
        load_model(str(run)).model,
        teacher.model,
        teacher.tokenizer,
        [text],
        settings=fast_settings(seq_len=context, stride=context),
    )
    for model, harness in zip(
        own["models"][:2], found["perplexity_per_token"].values(), strict=True
    ):
        assert model["quality"]["num_tokens"] == harness["num_tokens"]
        loss = math.log(harness["lm_eval"])
        assert math.exp(loss - model["quality"]["loss_nats"]) == pytest.approx(1, rel=1e-4)


def test_the_harness_takes_the_folder_by_itself(run: Path, result: Any) -> None:
    flags = ["--model", "hf", "--tasks", "cleangpt_text", "--limit", "3", "--device", "cpu"]
    flags += ["--model_args", f"pretrained={run / 'final'},trust_remote_code=True"]
    flags += ["--include_path", str(ROOT / "distillation" / "evaluation" / "lm_eval_tasks")]
    done = called("lm_eval", *flags, "--output_path", str(run.parent / "alone"), cwd=run.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (run.parent / "alone").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["cleangpt_text"]["byte_perplexity,none"]
    ours = result["scores"]["student (SASP)"]["cleangpt_text"]["byte_perplexity"]
    assert found == pytest.approx(ours, rel=1e-6)


def test_an_unknown_task_is_two_lines(run: Path) -> None:
    flags = ["--model_path", str(run), "--tasks", "cleangpt_txt"]
    done = called("distillation.evaluation.lm_eval", *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "error: --tasks: lm_eval knows no task 'cleangpt_txt'.",
        "fix: Did you mean cleangpt_text? lm_eval ls tasks lists all.",
    ]
