"""Evaluation and report (E01, E06 and E07 of docs/faults.md)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.cli import run_command
from cleangpt.errors import CheckpointError, InputError, Stopped
from cleangpt.integrity import SEAL, sealed
from cleangpt.runtime.module_state import tensors_fingerprint
from distillation.evaluation.evaluate_distilled_model import main
from distillation.evaluation.loading import load_model
from distillation.utils import save_checkpoint
from tests.builders import tiny_student
from tests.faults.small_runs import (
    STEPS,
    TRAINING,
    equal_weights,
    file_size_limit,
    send_sigterm,
    small_trainer,
)


def flags(model: Path, made: Path, out: Path) -> list[str]:
    options = {
        "--model_path": str(model),
        "--teacher_model_name": str(made / "teacher"),
        "--dataset_name": str(made / "test.txt"),
        "--output_dir": str(out),
        "--speed_seconds": "0",
        "--device": "cpu",
    }
    return [part for pair in options.items() for part in pair]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.evaluation_samples import PROSE, save_run, save_teacher

    root = tmp_path_factory.mktemp("evaluation")
    save_run(root / "whole")
    save_teacher(root / "teacher")
    (root / "test.txt").write_text("\n\n\n".join(PROSE))
    return root


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        ("Vanilla", 6),
        pytest.param("Vanilla", 10, marks=pytest.mark.slow),
        pytest.param("gpt2", 10, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_half_done_is_evaluated_and_labelled(
    kind: str, stop: int, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At step 6, in the blocks, the head is still tied; at step 10, in its phase, no longer."""
    from tests.evaluation_samples import student, teacher

    own = teacher(seed=7, n_layer=2) if kind == "gpt2" else student()
    running = small_trainer(tmp_path, send_sigterm, stop, teacher=teacher(), student=own)
    with pytest.raises(Stopped):
        running.train(**TRAINING)
    loaded = load_model(str(tmp_path / "run"))
    assert equal_weights(loaded.model, own)
    assert loaded.name == f"{kind} (step {stop} of {STEPS})"
    assert "its status is stopped" in loaded.notes[0]
    assert not loaded.model.training
    if (kind, stop) == ("Vanilla", 10):
        out = tmp_path / "out"
        assert run_command(main, flags(tmp_path / "run", made, out)) == 0
        assert "student (Vanilla (step 10 of 16))" in capsys.readouterr().out
        for name in ("report.html", "results.json"):
            assert "(step 10 of 16)" in (out / name).read_text()


@pytest.mark.slow
def test_a_run_with_nothing_saved_or_all_of_it_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        small_trainer(tmp_path, send_sigterm, 2).train(**TRAINING)
    run = tmp_path / "run"
    for path in (run / "checkpoints").glob("*/tensors.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="No checkpoint in .* can be used"):
        load_model(str(run))
    for path in (run / "checkpoints").iterdir():
        path.rename(run / path.name)
    with pytest.raises(CheckpointError, match="unfinished run without a checkpoint"):
        load_model(str(run))


@pytest.mark.slow
def test_the_steps_of_blocks_that_learn_together_count_once(tmp_path: Path) -> None:
    own = small_trainer(tmp_path, send_sigterm, 3, schedule="parallel_local")
    with pytest.raises(Stopped):
        own.train(**TRAINING)
    assert load_model(str(tmp_path / "run")).name == "Vanilla (step 2 of 12)"


@pytest.mark.slow
def test_numbers_are_printed_where_the_disk_is_full(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with file_size_limit(12_000):  # the page is larger
        assert run_command(main, flags(made / "whole", made, out)) == 5
    shown = capsys.readouterr()
    assert "student (Vanilla)" in shown.out
    assert "bytes needed" in shown.err
    assert not list(out.glob(".*.tmp"))
    assert not (out / "report.html").exists()


HOLD = """
import sys, time
from pathlib import Path
from distillation.evaluation.report import _own_folder
with _own_folder(Path(sys.argv[1])) as folder:
    print(folder.name, flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_two_evaluations_at_once_have_a_folder_each_until_one_is_killed(
    made: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "out\n"
        assert run_command(main, flags(made / "whole", made, tmp_path / "out")) == 0
        child.kill()
    assert (tmp_path / "out-2" / "report.html").is_file()
    assert not (tmp_path / "out" / "report.html").exists()
    assert run_command(main, flags(made / "whole", made, tmp_path / "out")) == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_class_that_a_file_names_is_looked_up_and_never_imported(tmp_path: Path) -> None:
    path = save_checkpoint(tiny_student(), tmp_path / "a.pt")
    content: Any = torch.load(path, weights_only=True)
    about = {k: v for k, v in json.loads(content["metadata"]).items() if k != SEAL}
    about.update(model_class="os.system", model_type="os")
    own = tensors_fingerprint(content["model_state_dict"].items())
    torch.save({**content, "metadata": json.dumps(sealed(about, own))}, path)
    with pytest.raises(InputError, match="'os', which is not registered"):
        load_model(str(path))
