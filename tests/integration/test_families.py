"""Families of teachers that transformers ships: each small, loaded, taken apart and distilled."""

import json
import math
import re
from pathlib import Path

import pytest
import transformers

from benchmarks.families import FAMILIES, tiny_model, try_family
from benchmarks.teachers import PAGE, page, row
from distillation.evaluation import evaluate_distilled_model
from examples import run_distillation_example
from tests.saved_teachers import build, save

KNOWN = (
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "mpt", "falcon", "llama", "mistral"),
    *("qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "starcoder2"),
    *("stablelm", "cohere", "granite", "smollm3"),
)
REFUSALS = {
    "mamba": "state-space or recurrent model",
    "xlm": "not causal",
    "gemma3n_text": "No single module",
    "zaya": "its blocks pass on more",
    "qwen4_exp": r"states of shape \[1, 2, 128\]",
}


def verdicts() -> dict[str, str]:
    """The verdicts of the page."""
    text = Path(PAGE).read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    return {
        name: title.lower()
        for title, table in zip(parts[::2], parts[1::2], strict=True)
        for name in re.findall(r"^\| ([\w-]+) \|", table, flags=re.MULTILINE)
        if name != "family" and title != "GGUF files"
    }


# These are like others of the list in all that is looked at here.
ALIKE = {
    *("mistral", "qwen2", "gemma", "gemma2", "phi3", "olmo2", "starcoder2", "granite", "smollm3"),
    *("phi", "stablelm", "gpt_neox", "qwen3"),
}


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in KNOWN],
)
def test_a_family_works_whole(family: str) -> None:
    finding = try_family(family)
    assert (finding.verdict, finding.remark) == ("works", "")
    assert finding.logits is not None
    assert finding.advance == 0
    assert finding.logits < 1e-6
    assert verdicts()[family] == "works"


@pytest.mark.parametrize("family", REFUSALS)
def test_a_family_is_refused_with_what_was_looked_for(family: str) -> None:
    finding = try_family(family)
    assert finding.verdict == "refused"
    assert re.search(REFUSALS[family], finding.remark)


def test_a_family_that_cannot_be_small_is_not_tried() -> None:
    with pytest.raises(ValueError, match="smallest form here has"):
        tiny_model("blt")
    assert try_family("blt").verdict == "not tried"


@pytest.mark.skipif(
    f"transformers {transformers.__version__}." not in Path(PAGE).read_text(encoding="utf-8"),
    reason="the page is of another version of transformers",
)
def test_the_page_has_every_family_once() -> None:
    assert set(verdicts()) == set(FAMILIES)
    written = page([try_family("gpt2")])
    assert "1 of 1 families work, 0 are refused" in written
    assert row(try_family("gpt2")) in written


@pytest.mark.slow
@pytest.mark.timeout(3600)  # some 150 families, one after another
def test_the_page_is_what_is_found() -> None:
    found = {family: try_family(family).verdict for family in FAMILIES}
    assert found == verdicts()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3", "opt", "gpt_neox"])
def test_both_commands_run_on_a_family(family: str, tmp_path: Path) -> None:
    teacher = save(tmp_path / family, build(family))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of a small text to learn from" for i in range(60)))
    run = tmp_path / "run"
    shared = ["--dataset_name", str(text), "--max_samples", "40"]
    flags = ["--teacher_model_name_or_path", teacher, "--output_dir", str(run)]
    flags += ["--student_n_embd", "16", "--student_n_head", "2", "--block_size", "16"]
    flags += ["--recipe", "best", "--no_overfit_gate", "--validation_tokens", "64"]
    run_distillation_example.main([*flags, *shared, "--lm_head_epochs", "1"])
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert [row.get("block") for row in stages] == [0, 1, None, None]
    assert [row["stage"] for row in stages[2:]] == ["lm-head", "polish"]
    assert all(row["steps"] > 0 and math.isfinite(row["last_loss"]) for row in stages)
    folder = tmp_path / "evaluation"
    student = str(run / "student_model_final_distilled.pt")
    flags = ["--model_path", student, "--model_type", "Vanilla", "--teacher_model_name", teacher]
    evaluate_distilled_model.main(
        [*flags, *shared, "--speed_seconds", "0", "--output_dir", str(folder)]
    )
    result = json.loads((folder / "results.json").read_text())
    own = result["models"][1]
    assert math.isfinite(own["quality"]["perplexity"])
    assert 0 <= own["quality"]["kl_nats"] < 20
    assert len(result["hidden_states"]["blocks"]) == 2
