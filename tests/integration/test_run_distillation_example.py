"""The command, called in this process: every flag acts, and wrong ones are refused in two lines."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.local_hub import save_tiny_gpt2, write_stories

BASE = (
    *("--student_n_layer", "1", "--student_n_embd", "16", "--student_n_head", "2"),
    *("--max_samples", "8", "--block_size", "64", "--batch_size", "4", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("example")
    save_tiny_gpt2(place / "teacher", blocks=2)
    write_stories(place / "stories", extra_columns=("summary",))
    return place


def run(place: Path, name: str, *flags: str) -> tuple[dict[str, Tensor], Path]:
    """Run the command; return what it trained and where it wrote."""
    from distillation.commands.distil import distil
    from distillation.commands.settings import parse_arguments

    where = ("--output_dir", str(place / "runs" / name), "--overwrite")
    data = ("--teacher_model_name_or_path", str(place / "teacher"))
    data = (*data, "--dataset_name", str(place / "stories"))
    arguments = parse_arguments([*data, *BASE, *where, "--recipe", "tutorial", *flags])
    _, student = distil(arguments)
    return student.state_dict(), place / "runs" / name


@pytest.fixture(scope="module")
def plain(place: Path) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    return run(place, "plain")[0]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_command_gives_the_same_bits(place: Path, plain: Any) -> None:
    assert equal(run(place, "again")[0], plain)
    before = set(multiprocessing.active_children())
    assert equal(run(place, "workers", "--num_workers", "1")[0], plain)
    assert set(multiprocessing.active_children()) <= before  # none is left behind
    # What only changes words, not weights:
    assert equal(run(place, "log", "--log_interval", "1")[0], plain)


def test_the_settings_of_a_run_repeat_it(place: Path, plain: Any) -> None:
    """From its own file, whatever other flags are given now."""
    from distillation.commands.distil import distil
    from distillation.commands.settings import parse_arguments

    settings = place / "runs" / "plain" / "config.yaml"
    again = place / "runs" / "from settings"
    _, student = distil(parse_arguments(["--config", str(settings), "--output_dir", str(again)]))
    assert equal(student.state_dict(), plain)
    text = (again / "config.yaml").read_text()
    assert f"output_dir: {again}  # flag" in text
    assert "lm_head_epochs" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--student_model_type SASP",
        "--student_n_layer 2",
        "--student_n_embd 32",
        "--student_n_head 4",
        "--student_dropout 0.3",
        "--student_bias",
        "--student_model_type Factored --student_use_v",
        "--student_model_type Factored --student_use_proj",
        "--student_use_channel_factor_v",
        "--student_use_channel_factor_proj",
        "--dataset_split validation",
        "--dataset_text_column summary --max_samples 4",
        "--max_samples 4",
        "--block_size 32",
        "--batch_size 2",
        "--epochs_per_block 2",
        "--lr_per_block 3e-3",
        "--weight_decay_per_block 0.9",
        "--max_grad_norm_per_block 1e-3 --lr_schedule linear",
        "--distill_loss_type kl_div",
        "--distill_loss_type kl_div --distill_loss_temperature 3",
        "--no_stitching_layers --student_n_embd 48",
        "--no_stitching_layer_bias",
        "--first_hidden_position 1",
        "--lm_head_epochs 2",
        "--lm_head_lr 3e-3",
        "--lm_head_weight_decay 0.9",
        "--lm_head_max_grad_norm 1e-4",
        "--no_train_lm_head",
        "--logit_loss_type mse",
        "--logit_loss_type ce",
        "--logit_loss_temperature 1",
        "--logit_loss_weight 0.001",
        "--no_initialize_head_from_teacher",
        "--seed 1",
        "--gradient_accumulation_steps 2",
        "--lr_schedule constant",
        "--warmup_ratio 0.5",
        "--min_lr_ratio 0.9",
        "--activation_dtype bf16",
        "--no_packing",
    ],
)
def test_every_flag_acts(place: Path, plain: Any, flags: str) -> None:
    assert not equal(run(place, "changed", *flags.split())[0], plain)


@pytest.mark.slow
def test_flags_that_only_show_in_a_combination(place: Path) -> None:
    two = ("--student_n_layer", "2")
    frozen = run(place, "frozen", *two)[0]
    assert not equal(run(place, "free", *two, "--no_freeze_previous_blocks")[0], frozen)
    kl = ("--distill_loss_type", "kl_div")
    warm = (*kl, "--distill_loss_temperature", "3")
    assert not equal(run(place, "kl", *kl)[0], run(place, "warm", *warm)[0])
    per_block = run(place, "list", *two, "--lr_per_block", "1e-3,5e-4")[0]
    first_block = [name for name in frozen if name.startswith("blocks.0.")]
    assert all(torch.equal(per_block[name], frozen[name]) for name in first_block)
    assert not equal(per_block, frozen)


def test_flags_that_write_files(place: Path) -> None:
    flags = ("--hidden_state_pictures", "--keep_start", "--epochs_per_block", "1")
    run_dir = run(place, "files", *flags)[1]
    assert (run_dir / "start" / "model.safetensors").is_file()
    assert (run_dir / "pictures" / "hidden_states_block_0_epoch_0.png").is_file()


@pytest.mark.slow
def test_flags_of_the_activation_cache(place: Path, plain: Any) -> None:
    keep = ("--activation_cache", "disk", "--keep_activations")
    weights, run_dir = run(place, "cache", *keep)
    assert equal(weights, plain)
    sizes = [(run_dir / "activations" / "teacher.states").stat().st_size]
    limited, run_dir = run(place, "cache", *keep, "--activation_cache_gb", "2e-5")
    assert all(torch.allclose(limited[name], plain[name], atol=1e-4) for name in plain)
    sizes.append((run_dir / "activations" / "teacher.states").stat().st_size)
    assert sizes[0] > 5 * sizes[1] > 0
    assert not (run(place, "cache", "--activation_cache", "off")[1] / "activations").exists()


def test_threads_are_set_as_asked(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    from distillation.commands.distil import prepare
    from distillation.commands.settings import parse_arguments

    caplog.set_level("INFO")
    data = ("--teacher_model_name_or_path", str(place / "teacher"))
    data = (*data, "--dataset_name", str(place / "stories"), "--dataset_text_column", "text")
    for count in (1, 3):
        where = ("--output_dir", str(place / "runs" / "threads"), "--threads", str(count))
        prepare(parse_arguments([*data, *BASE, *where]))
        assert torch.get_num_threads() == count
    assert "on cpu, 3 threads (as asked)" in caplog.text


@pytest.mark.slow
def test_tokens_are_kept_where_asked(
    place: Path,
    plain: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from cleangpt.data import token_cache

    caplog.set_level("INFO")
    monkeypatch.setattr(token_cache, "MIN_CHARACTERS", 0)
    monkeypatch.setenv("CLEANGPT_CACHE", str(tmp_path / "default"))
    assert equal(run(place, "uncached", "--no_token_cache")[0], plain)
    assert not any(tmp_path.iterdir())
    for _ in range(2):
        assert equal(run(place, "cached", "--token_cache", str(tmp_path / "own"))[0], plain)
    assert "from the cache at" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    run(place, "cached")
    assert len(list((tmp_path / "default" / "tokens").iterdir())) == 1


def test_a_missing_column_continues_on_the_only_one_and_says_so(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_stories(tmp_path / "one")
    run(place, "story", "--dataset_name", str(tmp_path / "one"), "--dataset_text_column", "story")
    assert "there is no column 'story'; continuing with 'text'" in caplog.text


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--student_n_embd 17 --student_n_head 2", 2, ["n_embd", "n_head"]),
        ("--student_n_layer 2 --layer_map 1,0", 2, ["falls from 1 to 0", "such as 0,1"]),
        ("--block_size 4000", 2, ["--block_size 4000", "128"]),
        ("--no_stitching_layers", 2, ["Dimension mismatch at block 0", "use_stitching_layers"]),
        ("--lr_per_block nan", 2, ["--lr_per_block", "nan"]),
        ("--lr_per_block 1e-3,1e-3", 2, ["2 entries", "1 blocks"]),
        ("--logit_loss_temperature 0", 2, ["--logit_loss_temperature"]),
        ("--student_n_embbd 8", 2, ["--student_n_embbd", "--student_n_embd"]),
        ("--dataset_text_column body", 3, ["summary (string)", "text (string)"]),
        ("--max_samples 1 --block_size 128 --dataset_name short.txt", 3, ["6 tokens", "128"]),
        ("--dataset_split dev", 3, ["dev", "train"]),
        ("--teacher_model_name_or_path ./nowhere", 3, ["./nowhere"]),
        ("--device mps", 2, ["mps", "--device cpu"]),
    ],
)
def test_wrong_flags_are_refused_in_two_lines(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    code: int,
    words: list[str],
) -> None:
    from cleangpt.cli import run_command
    from examples.run_distillation_example import main

    out = place / "refused"
    monkeypatch.chdir(place)
    (place / "short.txt").write_text("hello\n")
    data = ["--teacher_model_name_or_path", str(place / "teacher")]
    data += ["--dataset_name", str(place / "stories"), "--dataset_text_column", "text"]
    assert run_command(main, [*data, *BASE, "--output_dir", str(out), *flags.split()]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line[:2].isdigit()]
    assert [line.split(":")[0] for line in lines[-2:]] == ["error", "fix"]
    for word in words:
        assert word in "\n".join(lines[-2:])
    assert "Traceback" not in "\n".join(lines)
    assert not out.exists()


def test_an_earlier_run_is_not_overwritten_by_accident(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cleangpt.cli import run_command
    from examples.run_distillation_example import main

    _, run_dir = run(place, "kept")
    before = (run_dir / "manifest.json").read_bytes()
    data = ["--teacher_model_name_or_path", str(place / "teacher")]
    data += ["--dataset_name", str(place / "stories"), "--output_dir", str(run_dir)]
    assert run_command(main, [*data, *BASE]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (run_dir / "manifest.json").read_bytes() == before


def test_evaluating_on_the_training_text_is_pointed_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distillation.evaluation import evaluate_distilled_model

    _, run_dir = run(place, "overlap", "--max_samples", "4")
    flags = ["--model_path", str(run_dir), "--teacher_model_name", str(place / "teacher")]
    flags += ["--speed_seconds", "0", "--device", "cpu", "--max_samples", "4"]
    same = ["--dataset_name", str(place / "stories"), "--dataset_text_column", "text"]
    evaluate_distilled_model.main([*flags, *same, "--dataset_split", "train"])
    assert "was trained on 100% of this text" in capsys.readouterr().out
    other = tmp_path / "other.txt"
    other.write_text("Quite another text, of which the student has never seen a line. " * 20)
    evaluate_distilled_model.main([*flags, "--dataset_name", str(other)])
    assert "of this text" not in capsys.readouterr().out
