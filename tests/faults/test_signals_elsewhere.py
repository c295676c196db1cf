"""SIGTERM and Ctrl-C wherever a command may be (P06 of docs/faults.md), and not in a step.

The signals are real and the handlers those of the commands; a line of the log, a text that is read
or a batch that is asked for decides the moment.
"""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.cli import run_command
from cleangpt.data import token_cache
from cleangpt.data.windows import TextDataset
from tests.builders import batches, tiny_student
from tests.byte_tokenizer import make_tokenizer
from tests.faults.small_runs import TRAINING, send_sigterm, signal_at, small_trainer

CODES = [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.evaluation_samples import PROSE, save_run, save_teacher

    root = tmp_path_factory.mktemp("signals")
    save_run(root / "run")
    save_teacher(root / "teacher")
    (root / "test.txt").write_text("\n\n\n".join(PROSE * 4))
    return root


def evaluation(made: Path, out: Path) -> int:
    from distillation.evaluation.evaluate_distilled_model import main

    options = {
        "--model_path": str(made / "run"),
        "--teacher_model_name": str(made / "teacher"),
        "--dataset_name": str(made / "test.txt"),
        "--output_dir": str(out),
        "--speed_seconds": "0",
        "--device": "cpu",
    }
    return run_command(main, [part for pair in options.items() for part in pair])


class Texts(Sequence[str]):
    """Documents whose last one comes with a signal, the second time they are read."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.times = 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        return "some text"

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        yield from ("some text", "and more")
        if self.times == 3:  # their length and their hash are taken first
            os.kill(os.getpid(), self.number)
        yield "the end"


@pytest.mark.parametrize(("number", "code"), CODES)
def test_while_tokenizing(
    number: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(token_cache, "MIN_CHARACTERS", 0)
    tokenizer, texts = make_tokenizer(eos_token="<end>"), Texts(number)

    def tokenize(argv: Any) -> None:
        TextDataset(texts, tokenizer, 4, cache_dir=tmp_path / "cache")

    assert run_command(tokenize, []) == code
    assert texts.times == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "fix"]
    assert lines[0].split()[-1] == ("SIGTERM" if code == 143 else "Ctrl-C")
    assert not (tmp_path / "cache").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_while_a_model_is_loaded(made: Path, tmp_path: Path) -> None:
    from examples.run_distillation_example import main

    flags = ["--teacher_model_name_or_path", str(made / "teacher"), "--trust_remote_code"]
    flags += ["--dataset_name", str(made / "test.txt"), "--device", "cpu"]
    with signal_at("code that comes with teacher") as sent:
        assert run_command(main, [*flags, "--output_dir", str(tmp_path / "run")]) == 143
    assert sent.count == 1
    assert not (tmp_path / "run").exists()


class Loader(list[Any]):
    """Batches; a signal comes with one of them, counted over all epochs."""

    def __init__(self, at: int) -> None:
        super().__init__(batches(4))
        self.at, self.asked = at, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in list.__iter__(self):
            self.asked += 1
            if self.asked == self.at:
                send_sigterm()
            yield batch


@pytest.mark.parametrize(
    ("at", "where"),
    [(2, "between two stages; it goes on from the last"), (7, "at block-00, epoch 0, step 3;")],
    ids=["audit", "first epoch"],
)
@pytest.mark.slow
def test_while_states_are_computed_and_kept(
    at: int, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The audit reads four batches, then the first epoch fills the files of states."""
    options: dict[str, Any] = {"activation_cache": "disk", "audit_tokens": 10**6}

    def train(argv: Any) -> None:
        small_trainer(tmp_path, data=Loader(at), **options).train(**TRAINING)

    assert run_command(train, []) == 143
    assert where in capsys.readouterr().err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "stopped"
    assert not (tmp_path / "run" / "activations").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    results = small_trainer(tmp_path, data=Loader(0), **options).train(**TRAINING)
    assert results["polish"]["steps"] == 4


@pytest.mark.parametrize(("number", "code"), CODES)
def test_while_evaluating(number: int, code: int, made: Path, tmp_path: Path) -> None:
    with signal_at("Scoring", number) as sent:
        assert evaluation(made, tmp_path / "out") == code
    assert sent.count == 1
    assert not (tmp_path / "out").exists()


def test_an_evaluation_that_is_interrupted_leaves_the_models_as_they_were() -> None:
    from distillation.evaluation import evaluate
    from tests.evaluation_samples import PROSE, byte_tokenizer, fast_settings, student, teacher

    models = student().train(), teacher().train()
    calls = [0]

    def interrupt(module: Any, inputs: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handle = models[1].transformer.h[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*models, byte_tokenizer(), PROSE, settings=fast_settings())
    handle.remove()
    assert calls[0] == 3
    for model in models:
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["drawing", "writing"])
def test_while_a_report_is_drawn_and_written(
    moment: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is drawn nothing is there; once the first file is, all of them come."""
    from distillation.evaluation import plots, report

    place: tuple[Any, str] = (plots, "draw_plots") if moment == "drawing" else (report, "_write")
    real = getattr(*place)

    def signalled(*arguments: Any) -> Any:
        send_sigterm()
        return real(*arguments)

    monkeypatch.setattr(*place, signalled)
    assert evaluation(made, tmp_path / "out") == 143
    if moment == "drawing":
        assert not (tmp_path / "out").exists()
    else:
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"results.json", "report.md", "report.html", "models.png"} <= names
        assert not any(name.endswith(".tmp") for name in names)


def test_a_handler_of_somebody_else_is_left_alone() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        assert run_command(lambda argv: send_sigterm(), []) == 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


def test_a_second_sigterm_does_not_disturb_the_clearing_up(tmp_path: Path) -> None:
    def main(argv: Any) -> None:
        try:
            send_sigterm()
        finally:
            send_sigterm()
            torch.save(tiny_student().state_dict(), tmp_path / "cleared")

    assert run_command(main, []) == 143
    assert (tmp_path / "cleared").stat().st_size > 0
