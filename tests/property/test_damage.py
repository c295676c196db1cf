"""Every file a run writes, damaged anywhere: refused by name, or as good as undamaged.

A real run is made once: stopped in the middle, kept, and finished, with states on disk, tokens in
a cache and a start. Each example then changes one file, opens it as the project does, and puts the
file back.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from cleangpt.checkpoints import Checkpoints
from cleangpt.cli import run_command
from cleangpt.errors import CheckpointError, CleanGPTError, Stopped
from cleangpt.integrity import check_sums, parse_json_object
from cleangpt.manifest import check_listed, read_manifest
from cleangpt.metrics_log import MetricsLog
from distillation.evaluation.audit_table import read_audit
from distillation.evaluation.loading import load_model
from distillation.journal import check_same_settings
from distillation.utils.checkpoint import load_checkpoint

STUDENT_FILE = "student_model_final_distilled.pt"
few = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
many = settings(few, max_examples=300)

Damage = Callable[[bytes], bytes | None]


class Made(NamedTuple):
    """Where the run is, once stopped and once finished, and what it was made of."""

    stopped: Path
    done: Path
    teacher: Path
    text: Path
    settings: dict[str, Any]


def flipped(place: float, bit: int) -> Damage:
    def damage(content: bytes) -> bytes:
        at = min(int(place * len(content)), len(content) - 1)
        return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]

    return damage


def overwritten(place: float, junk: bytes) -> Damage:
    def damage(content: bytes) -> bytes:
        at = int(place * len(content))
        return content[:at] + junk + content[at + len(junk) :]

    return damage


DAMAGES: st.SearchStrategy[Damage] = st.one_of(
    st.builds(flipped, st.floats(0, 1), st.integers(0, 7)),
    st.builds(overwritten, st.floats(0, 1), st.binary(min_size=1, max_size=40)),
    st.floats(0, 1).map(lambda share: lambda content: content[: int(share * len(content))]),
    st.binary(min_size=1, max_size=40).map(lambda junk: lambda content: content + junk),
    st.sampled_from(
        [
            b"",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            b"<!DOCTYPE html><html>",
            b"{}",
            b"[" * 100_000,
            b'{"a": ' + b"9" * 5000 + b"}",
            b"\xff\xfe\x00",
        ]
    ).map(lambda other: lambda content: other),
    st.just(lambda content: None),
)


@contextlib.contextmanager
def damaged(path: Path, damage: Damage) -> Iterator[bool]:
    """The file as damaged, inside the block; yields whether its bytes differ at all."""
    content = path.read_bytes()
    changed = damage(content)
    try:
        if changed is None:
            path.unlink()
        else:
            path.write_bytes(changed)
        yield changed != content
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    from tests.evaluation_samples import PROSE, save_teacher

    root = tmp_path_factory.mktemp("damage")
    (root / "text").mkdir()
    (root / "text" / "test.txt").write_text("\n\n\n".join(PROSE))
    folder = root / "run"
    with pytest.raises(Stopped):
        train(folder, stop=9)
    shutil.copytree(folder, root / "stopped")
    train(folder)
    settings = json.loads((folder / "config.json").read_text())
    return Made(root / "stopped", folder, save_teacher(root / "teacher"), root / "text", settings)


def train(folder: Path, stop: int = 0) -> Any:
    from cleangpt.data import DistillationDataCollator, TextDataset, make_dataloader
    from distillation import DistillationTrainer
    from tests.evaluation_samples import PROSE, byte_tokenizer, student, teacher

    count = [0]

    def stepped(*_: Any) -> None:
        count[0] += 1
        if count[0] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def optimizer(groups: Any, lr: float) -> Any:
        made = torch.optim.AdamW(groups, lr=lr)
        made.register_step_post_hook(stepped)
        return made

    tokenizer = byte_tokenizer()
    windows = TextDataset(PROSE, tokenizer, block_size=16)
    return DistillationTrainer(
        teacher(),
        student(),
        tokenizer,
        make_dataloader(windows, DistillationDataCollator(tokenizer, 16), batch_size=16),
        output_dir=folder,
        precision="fp32",
        init_from_teacher="pca",
        activation_cache="disk",
        keep_activations=True,
        checkpoint_steps=2,
        keep_start=True,
        optimizer_cls=optimizer,
        resume=True,
    ).train(1, 1e-2)


def outcome(read: Callable[[], Any]) -> Any:
    """What reading gives, or the refusal, which must be ours and of two lines."""
    try:
        return read()
    except CleanGPTError as error:
        refusal = error
    assert refusal.exit_code in (3, 4)
    assert len(str(refusal).splitlines()) == 2
    return refusal


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[name], value) for name, value in expected.items()
        )
    return bool(found == expected)


def student_file(made: Made, damage: Damage) -> None:
    path = made.done / STUDENT_FILE
    with damaged(path, damage):
        found = outcome(lambda: load_checkpoint(path))
    if not isinstance(found, CleanGPTError):  # bytes between the records mean nothing
        assert same(found, load_checkpoint(path))


def manifest(made: Made, damage: Damage) -> None:
    for folder in (made.stopped, made.done):
        with damaged(folder / "manifest.json", damage):
            found = outcome(lambda folder=folder: read_manifest(folder))  # type: ignore[misc]
        expected = read_manifest(folder)
        assert isinstance(found, CheckpointError) or found is None or found == expected


def listed_files(made: Made, damage: Damage) -> None:
    for name in ("config.json", "metrics.jsonl", "audit.json", STUDENT_FILE):
        with damaged(made.done / name, damage) as changed:
            found = outcome(lambda name=name: check_listed(made.done, name))  # type: ignore[misc]
        assert isinstance(found, CheckpointError) is changed, name


def run_folders(made: Made, damage: Damage) -> None:
    for folder in (made.done / "final", made.done / "start"):
        for path in folder.iterdir():
            with damaged(path, damage) as changed:
                found = outcome(lambda folder=folder: check_sums(folder))  # type: ignore[misc]
            # The list itself protects the others; cut at a line it lists fewer. The model card is
            # its reader's to change, and evaluations write it anew.
            protected = path.name not in ("SHA256SUMS", "README.md")
            assert isinstance(found, CheckpointError) is changed or not protected, path


def stitches(made: Made, damage: Damage) -> None:
    def read() -> dict[str, Tensor]:
        loaded = load_model(str(made.done / STUDENT_FILE)).stitches
        return {} if loaded is None else dict(loaded.state_dict())

    expected = read()
    with damaged(made.done / "stitching_layers.safetensors", damage):
        found = outcome(read)
        gone = not (made.done / "stitching_layers.safetensors").exists()
    # Without the file they are fitted anew, which the report says.
    assert isinstance(found, CheckpointError) or same(found, {} if gone else expected)


def settings_of_a_stopped_run(made: Made, damage: Damage) -> None:
    path = made.stopped / "config.json"
    with damaged(path, damage):
        found = outcome(lambda: check_same_settings(path, made.settings))
    assert found is None or isinstance(found, CheckpointError)


def checkpoints(made: Made, damage: Damage) -> None:
    run_id = str((read_manifest(made.stopped) or {})["run_id"])
    own = Checkpoints(made.stopped / "checkpoints", run_id)
    newest, older = sorted((made.stopped / "checkpoints").iterdir(), reverse=True)
    expected = own.newest()
    assert expected is not None
    for name in ("tensors.safetensors", "state.json", "MANIFEST.json"):
        with damaged(newest / name, damage):
            found: Any = own.newest()
            if found.step != expected.step:
                assert older.name.startswith(f"step-{found.step:08d}-")
                with damaged(older / name, damage):
                    both = outcome(own.newest)
                assert isinstance(both, CheckpointError) or both.step == found.step
            else:
                assert same(found.tensors, expected.tensors)
                assert found.state == expected.state


def metrics(made: Made, damage: Damage) -> None:
    """No weight depends on them: a warning, and what is not damaged stays."""
    path = made.stopped / "metrics.jsonl"
    log = MetricsLog(path)
    size, checksum = log.size(), log.checksum(log.size())
    with damaged(path, damage) as changed:
        is_whole = log.checksum(size) == checksum
        log.go_on(size, checksum)
    assert is_whole or changed


def audit(made: Made, damage: Damage) -> None:
    expected = read_audit(made.done)
    assert expected is not None
    with damaged(made.done / "audit.json", damage) as changed:
        assert read_audit(made.done) == (None if changed else expected)


@functools.cache
def models() -> Any:
    from cleangpt.blocks import BlockStack
    from tests.evaluation_samples import student, teacher

    return BlockStack(teacher()), BlockStack(student())


def kept_states(made: Made, damage: Damage) -> None:
    from distillation.activations import Activations
    from distillation.batch import as_batch
    from distillation.config import DistillationConfig

    first = {"input_ids": torch.arange(32).reshape(2, 16) + 1}
    batch = as_batch({**first, "attention_mask": torch.ones(2, 16).long()}, torch.device("cpu"))
    config = DistillationConfig(activation_cache="disk", keep_activations=True)
    folder = made.done.parent / "states"

    def read() -> Tensor:
        activations = Activations(*models(), 0)
        with activations.opened(config, folder, None, "fp32"):
            return activations.teacher_output(1, batch).clone()

    expected = read()
    files = {path: path.read_bytes() for path in folder.iterdir()}
    for path in files:
        with damaged(path, damage):
            found = outcome(read)
        assert isinstance(found, CheckpointError) or torch.equal(found, expected)
        for each, content in files.items():  # states that were dropped are written anew
            each.write_bytes(content)


def token_cache(made: Made, damage: Damage) -> None:
    from cleangpt.data.token_cache import TokenStream, cached_stream
    from tests.evaluation_samples import byte_tokenizer

    folder, texts = made.done.parent / "tokens", ["a word " * 200_000]
    stream = TokenStream(torch.arange(50), torch.tensor([0, 7]))

    def read() -> TokenStream:
        return cached_stream(folder, texts, byte_tokenizer(), {"eos": 1}, lambda: stream)

    read()
    (path,) = folder.iterdir()
    with damaged(path, damage):
        found = read()
    assert all(torch.equal(one, other) for one, other in zip(found, stream, strict=True))


READERS = [
    student_file, manifest, listed_files, run_folders, stitches, settings_of_a_stopped_run,
    checkpoints, metrics, audit, kept_states, token_cache,
]  # fmt: skip
every_reader = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)


@every_reader
@few
@given(damage=DAMAGES)
def test_damage_is_refused_or_changes_nothing(
    made: Made, reader: Callable[[Made, Damage], None], damage: Damage
) -> None:
    reader(made, damage)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@every_reader
@many
@given(damage=DAMAGES)
def test_much_damage_is_refused_or_changes_nothing(
    made: Made, reader: Callable[[Made, Damage], None], damage: Damage
) -> None:
    reader(made, damage)


def evaluate(made: Made, place: str) -> int:
    from distillation.evaluation.evaluate_distilled_model import main

    flags = {
        "--model_path": str(made.done / place),
        "--teacher_model_name": str(made.teacher),
        "--dataset_name": str(made.text),
        "--output_dir": str(made.done.parent / "out"),
        "--speed_seconds": "0",
        "--device": "cpu",
    }
    return run_command(main, [part for pair in flags.items() for part in pair])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (STUDENT_FILE, STUDENT_FILE),
        ("final/model.safetensors", ""),
        ("final/config.json", ""),
        ("final/tokenizer.json", "final"),
        ("stitching_layers.safetensors", ""),
        ("manifest.json", ""),
    ],
)
def test_the_command_refuses_a_flipped_bit(
    made: Made, name: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with damaged(made.done / name, flipped(0.7, 0)):
        assert evaluate(made, place) == 4
    *_, cause, remedy = capsys.readouterr().err.splitlines()
    assert cause.startswith("error: ")
    assert str(made.done / name) in cause
    assert remedy.startswith("fix: ")
    assert not (made.done.parent / "out").exists()


@pytest.mark.parametrize("name", ["manifest.json", "config.json", STUDENT_FILE])
def test_a_finished_run_whose_files_changed_is_not_given_back(made: Made, name: str) -> None:
    with damaged(made.done / name, flipped(0.6, 1)):
        assert isinstance(outcome(lambda: train(made.done)), CheckpointError)


def test_json_that_is_no_object_is_a_value_error() -> None:
    for text in ("[]", "1", "{", "", '{"a": NaN}', "[" * 100_000, '{"a": ' * 100_000):
        with pytest.raises(ValueError):  # noqa: PT011 - every text has words of its own
            parse_json_object(text)
