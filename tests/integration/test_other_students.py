"""Students that are not built here: any causal LM of transformers, and a student that exists."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError, UsageError
from cleangpt.teacher import Teacher
from distillation.commands import distil as command
from distillation.commands.settings import parse_arguments
from distillation.commands.student import student_like
from distillation.evaluation import evaluate_distilled_model
from distillation.evaluation.loading import load_model
from tests.builders import LLAMA_LIKE, tiny_teacher
from tests.saved_teachers import CONFIGS, VOCAB, build, save

BLOCKS = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("students")
    save(place / "teacher", build("gpt2"))
    text = "\n\n".join(f"line {i} of a small text to learn from" for i in range(60))
    (place / "text.txt").write_text(text)
    deeper = {"hidden_size": 16, "head_dim": 8, "num_hidden_layers": BLOCKS + 1}
    config = CONFIGS["llama"]().to_dict() | deeper
    (place / "llama.json").write_text(json.dumps(config))
    return place


def run(place: Path, name: str, *flags: str) -> tuple[Path, str]:
    """Run the command; return its folder and what it printed as the evaluation's command."""
    arguments = ["--teacher_model_name_or_path", str(place / "teacher")]
    arguments += ["--dataset_name", str(place / "text.txt"), "--block_size", "16"]
    arguments += ["--output_dir", str(place / name), "--epochs_per_block", "1", "--device", "cpu"]
    parsed = parse_arguments([*arguments, *flags])
    results, _ = command.distil(parsed)
    return place / name, command.evaluation_command(parsed, results["student_path"])


def test_a_configuration_makes_a_student(place: Path) -> None:
    flags = ["--student_model_type", "hf", "--student_config", str(place / "llama.json")]
    folder, printed = run(place, "llama", *flags)
    assert "--model_type" not in printed
    by_file = load_model(str(folder / "student_model_final_distilled.pt")).model
    by_folder = load_model(str(folder)).model
    assert type(by_file).__name__ == type(by_folder).__name__ == "LlamaForCausalLM"
    ids = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        assert torch.equal(by_file(ids).logits, by_folder(ids).logits)
    words = shlex.split(printed)[3:]
    evaluate_distilled_model.main([*words, "--max_samples", "20", "--speed_seconds", "0"])
    result = json.loads((folder / "evaluation" / "results.json").read_text())
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    blocks = result["hidden_states"]["blocks"]
    recorded = [stage["relative_error"] for stage in stages if "block" in stage]
    assert [block["teacher_block"] for block in blocks] == [0, 1, 1]
    assert [block["local_error"] for block in blocks] == recorded
    assert all(block["relative_error"] > 0 for block in blocks)
    assert "| chained error | local error |" in (folder / "evaluation" / "report.md").read_text()


def test_a_configuration_like_the_teachers_is_the_teacher(place: Path) -> None:
    file = place / "same.json"
    file.write_text(CONFIGS["gpt2"]().to_json_string())
    flags = ["--student_model_type", "hf", "--student_config", str(file), "--recipe", "best"]
    flags += ["--no_overfit_gate", "--validation_tokens", "0", "--early_stop_patience", "0"]
    folder, _ = run(place, "same", *flags, "--epochs_per_block", "0", "--polish_epochs", "0")
    taught, teacher = (load_model(str(each)).model for each in (folder, place / "teacher"))
    ids = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        assert torch.equal(taught(ids).logits, teacher(ids).logits)
    assert not (folder / "stitching_layers.safetensors").exists()


def test_without_a_configuration_it_is_of_the_teachers_architecture(place: Path) -> None:
    flags = ["--student_model_type", "hf", "--student_n_layer", "1", "--layer_map", "measured"]
    flags += ["--recipe", "best", "--no_overfit_gate", "--validation_tokens", "0"]
    flags += ["--early_stop_patience", "0", "--epochs_per_block", "0", "--polish_epochs", "0"]
    folder, printed = run(place, "own", *flags)
    assert "--model_type" not in printed
    taught, teacher = (load_model(str(each)).model for each in (folder, place / "teacher"))
    assert type(taught) is type(teacher)
    own, theirs = BlockStack(taught), BlockStack(teacher)
    assert own.num_blocks == 1
    kept = theirs.block(0).state_dict()
    for name, tensor in own.block(0).state_dict().items():
        assert torch.equal(tensor, kept[name])


def teacher_of(model: Any, tokens: int = VOCAB - 2) -> Teacher:
    """A teacher with fewer tokens than rows: the rest is padding."""
    vocabulary = {f"<{token}>": token for token in range(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return Teacher(model, words, "small", "small", "")


KINDS_BY_BLOCK = {
    "gpt_neo": {
        "vocab_size": 67,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "max_position_embeddings": 32,
        "attention_types": [[["global", "local"], 1]],
    },
    "smollm3": LLAMA_LIKE,
}
"""Families with a list of their own that says something of every block."""


@pytest.mark.parametrize("family", [*CONFIGS, *KINDS_BY_BLOCK])
@pytest.mark.parametrize(
    "blocks", [*(pytest.param(blocks, marks=pytest.mark.slow) for blocks in (None, 1)), 3]
)
def test_every_architecture_has_students_of_its_own(
    family: str, blocks: int | None, tmp_path: Path
) -> None:
    own = KINDS_BY_BLOCK.get(family)
    model = tiny_teacher(family, config_fields=own) if own else build(family)
    before, rows = model.config.to_dict(), BlockStack(model).vocab_size
    model.config.pad_token_id = rows - 1  # one of those that are padding
    student = student_like(teacher_of(model, rows - 2), blocks, "uniform")
    stack = BlockStack(student)
    assert stack.num_blocks == (blocks or BlockStack(model).num_blocks)
    assert (stack.hidden_size, stack.vocab_size) == (BlockStack(model).hidden_size, rows - 2)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        logits = student(ids).logits
    assert logits.isfinite().all()
    assert model.config.to_dict() == before | {"pad_token_id": rows - 1}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    student.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path)).model(ids).logits, logits)


def test_its_blocks_are_of_the_kinds_of_those_they_start_from() -> None:
    model = tiny_teacher("gemma3")
    depth = BlockStack(model).num_blocks
    kinds = model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    assert depth == len(kinds)
    last = student_like(teacher_of(model), 2, "last").config.layer_types
    assert last == [kinds[0], kinds[2]]
    assert student_like(teacher_of(model), 2, [0, 2]).config.layer_types == kinds[:2]
    assert student_like(teacher_of(model), 4, [0, 1, 1, 2]).config.layer_types[:2] == kinds[:2]
    with pytest.raises(UsageError, match="does not fit"):
        student_like(teacher_of(model), 2, [0, 7])


def test_a_depth_that_an_architecture_has_not_is_told() -> None:
    model = build("llama")
    type(model.config).layer_types = property(lambda config: ["full_attention"] * BLOCKS)
    try:
        with pytest.raises(InputError, match="There is no LlamaForCausalLM of 3 such blocks"):
            student_like(teacher_of(model), 3, "uniform")
    finally:
        del type(model.config).layer_types


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_any_family_can_be_the_student(family: str, place: Path) -> None:
    file = place / f"{family}.json"
    file.write_text(CONFIGS[family]().to_json_string())
    flags = ["--student_model_type", "hf", "--student_config", str(file), "--recipe", "best"]
    folder, printed = run(place, f"a {family}", *flags, "--no_overfit_gate", "--polish_epochs", "1")
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    assert [row["stage"] for row in stages] == ["block-00", "block-01", "lm-head", "polish"]
    assert all(math.isfinite(row["last_loss"]) for row in stages if row["steps"])
    words = shlex.split(printed)[3:]
    evaluate_distilled_model.main([*words, "--max_samples", "20", "--speed_seconds", "0"])
    result = json.loads((folder / "evaluation" / "results.json").read_text())
    assert math.isfinite(result["models"][1]["quality"]["perplexity"])


def test_a_folder_with_weights_starts_from_them(place: Path) -> None:
    start = place / "start"
    model = build("opt")
    model.save_pretrained(start)
    flags = ["--student_model_type", "hf", "--student_config", str(start), "--blocks", "1"]
    flags += ["--recipe", "best", "--polish_epochs", "0", "--no_overfit_gate"]
    folder, _ = run(place, "opt", *flags, "--early_stop_patience", "0", "--validation_tokens", "0")
    before, after = model.state_dict(), load_model(str(folder)).model.state_dict()
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    first, second = (
        [torch.equal(before[n], after[n]) for n in before if f"layers.{block}." in n]
        for block in range(BLOCKS)
    )
    assert all(first)
    assert not all(second)


@pytest.mark.slow
def test_a_run_goes_on_where_another_ended(place: Path) -> None:
    one, _ = run(place, "one", "--student_n_embd", "16", "--blocks", "0", "--no_train_lm_head")
    folder, printed = run(place, "two", "--start_student", str(one), "--blocks", "1")
    assert "--model_type" not in printed
    before, after = (load_model(str(each)).model.state_dict() for each in (one, folder))
    kept = [name for name in before if "blocks.0." in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ("--student_config x.json", "is of a student that transformers builds"),
        ("--student_config x.json --student_n_layer 2", "is of a student that transformers builds"),
        (
            "--student_model_type hf --student_n_embd 4 --student_n_layer 2",
            "the teacher's configuration decides the student, so --student_n_embd would do nothing",
        ),
        (
            "--student_model_type hf --student_config x.json --student_n_embd 4",
            "--student_config decides the student, so --student_n_embd would do nothing",
        ),
        ("--start_student x --student_n_head 2", "--start_student decides the student"),
        ("--start_student x --student_model_type SASP", "--start_student decides the student"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        parse_arguments(flags.split())


def test_a_start_keeps_its_weights_unless_told_otherwise() -> None:
    parsed = parse_arguments(["--start_student", "x", "--recipe", "best"])
    assert parsed.init_from_teacher == "none"
    flags = ["--start_student", "x", "--init_from_teacher", "pca"]
    assert parse_arguments(flags).init_from_teacher == "pca"


def test_a_folder_keeps_its_head_only_if_it_has_weights(place: Path, tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path)
    start = ["--student_model_type", "hf", "--student_config"]
    for recipe in ("best", "tutorial"):
        flags = [*start, str(tmp_path), "--recipe", recipe]
        assert not parse_arguments(flags).initialize_head_from_teacher
        flags += ["--initialize_head_from_teacher"]
        assert parse_arguments(flags).initialize_head_from_teacher
        assert parse_arguments([*flags[:-1]]).init_from_teacher == "none"
        flags = [*start, str(place / "llama.json"), "--recipe", recipe]
        parsed = parse_arguments(flags)
        assert parsed.initialize_head_from_teacher
        assert parsed.init_from_teacher == ("pca" if recipe == "best" else "none")


BAD_CONFIGURATIONS = [
    *("{", "[]", "{}", '{"model_type": "zzz"}', '{"model_type": "gpt2", "n_layer": "3"}', None),
    '{"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}',
]


@pytest.mark.parametrize("content", BAD_CONFIGURATIONS)
def test_configurations_that_are_none(content: Any, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match="not the configuration of a causal language model"):
        run(place, "bad", "--student_model_type", "hf", "--student_config", str(file))


@pytest.mark.parametrize(
    "flag", ["--layer_map 1,x", "--layer_map middle", "--blocks 3-1", "--blocks 0-99999999999"]
)
def test_maps_and_blocks_that_do_not_parse(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(flag.split())
    assert "fix:" in capsys.readouterr().err
