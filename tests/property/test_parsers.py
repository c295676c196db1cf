"""Whatever is typed or handed in is understood as it was meant, or refused in our own words."""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from cleangpt.checkpoints import Checkpoint, Checkpoints
from cleangpt.cli import CommandParser, number_or_list, positive_float
from cleangpt.data import load_texts
from cleangpt.errors import CheckpointError, InputError, UsageError
from cleangpt.hub import local_path
from cleangpt.integrity import is_as_sealed, parse_json_object, sealed
from cleangpt.manifest import read_manifest
from cleangpt.run_directory import RunDirectory
from cleangpt.safe_text import clean_line, clean_text
from distillation.commands.settings import parse_arguments
from distillation.layer_map import LAYER_MAPS, choose_blocks, choose_layer_map

few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORDS = st.one_of(
    st.text(max_size=12),
    st.text("0123456789-,.eE ", max_size=12),
    st.lists(st.integers(-9, 99), max_size=5).map(lambda row: ",".join(map(str, row))),
    st.tuples(st.integers(-9, 99), st.integers(-9, 99)).map("{0[0]}-{0[1]}".format),
    st.sampled_from(["nan", "inf", "-inf", "1e400", "0x10", "1_000", "\u0663", "9" * 5000]),
)
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
).filter(lambda value: "inf" not in repr(value))
OBJECTS = st.dictionaries(st.text(max_size=5), PLAIN, max_size=5)


# Flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag",
    ["--layer_map", "--blocks", "--activation_cache_gb", "--lr_per_block", "--epochs_per_block",
     "--warmup_ratio", "--seed", "--threads", "--dataset_split", "--teacher_revision"],
)  # fmt: skip
@few
@given(word=WORDS)
def test_flags_are_parsed_or_refused_with_2(
    flag: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        parse_arguments([f"{flag}={word}"])
    except (SystemExit, UsageError) as stop:
        code = stop.code if isinstance(stop, SystemExit) else stop.exit_code
        assert code == 2
    capsys.readouterr()


@few
@given(values=st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=6))
def test_lists_of_numbers_come_back(values: list[float]) -> None:
    text = ", ".join(map(repr, values))
    assert number_or_list(positive_float)(text) == (values if len(values) > 1 else values[0])


@few
@given(words=st.lists(st.text(max_size=10), max_size=4))
def test_any_command_line_is_parsed_or_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = CommandParser(prog="tool")
    parser.add_argument("--known", type=positive_float)
    with contextlib.suppress(SystemExit):
        parser.parse_args(words)
        return
    shown = capsys.readouterr().err
    assert not shown or shown.splitlines()[0].startswith("error: ")


# Layer maps ---------------------------------------------------------------------------------------


@few
@given(
    st.one_of(st.sampled_from(LAYER_MAPS), st.lists(st.integers(-3, 14), max_size=14)),
    st.integers(1, 12),
    st.integers(1, 12),
)
def test_a_layer_map_goes_forward_through_the_teacher_or_is_refused(
    layer_map: Any, student_blocks: int, depth: int
) -> None:
    try:
        found = choose_layer_map(layer_map, student_blocks, depth)
    except UsageError:
        return
    assert len(found) == student_blocks
    assert all(0 <= block < depth for block in found)
    assert list(found) == sorted(found)
    if not isinstance(layer_map, str):
        assert list(found) == list(layer_map)


@few
@given(st.none() | st.lists(st.integers(-3, 14), max_size=14), st.integers(1, 12))
def test_blocks_that_learn_are_blocks_of_the_student(
    wanted: list[int] | None, student_blocks: int
) -> None:
    with contextlib.suppress(UsageError):
        found = choose_blocks(wanted, student_blocks)
        assert found <= set(range(student_blocks))
        assert sorted(found) == (list(range(student_blocks)) if wanted is None else sorted(wanted))


# Data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
@few
@given(content=st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(str.encode),
    st.lists(OBJECTS, max_size=3).map(json.dumps).map(str.encode),
    st.lists(st.fixed_dictionaries({"text": PLAIN}), max_size=4).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    ),
    st.sampled_from([b"[" * 9_999, b'{"text": ' * 9_999, b"9" * 9999, b'"' + b"x" * 9_000]),
))  # fmt: skip
@example(content=b'{"text": "\\ud800"}')
@example(content=b"PAR1" * 5)
def test_any_file_of_text_is_read_or_refused(suffix: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"data{suffix}")
        path.write_bytes(content)
        try:
            source = load_texts(str(path))
        except InputError as error:
            refusal: InputError | None = error
        else:
            refusal = None
            assert all(text.strip() and text.encode() for text in source.texts)
        assert refusal is None or len(str(refusal).splitlines()) == 2


@few
@given(name=st.one_of(st.text(max_size=20), st.sampled_from(["a" * 5000, "x\0", "~root/x", "~~"])))
def test_a_name_is_a_path_that_exists_a_hub_name_or_refused(name: str) -> None:
    try:
        found = local_path(name, flag="--x")
    except InputError:
        return
    assert found is None or found.exists()
    if found is None:
        assert ".." not in name.split("/")
        assert not name.startswith(("/", "."))
        assert "\0" not in name


@few
@given(split=st.text(max_size=10))
def test_splits_that_are_none_are_refused(split: str) -> None:
    if split not in ("train", "validation", "test"):
        with pytest.raises(InputError, match="has no split"):
            load_texts("builtin", split=split)


# What is written and read back --------------------------------------------------------------------


@few
@given(OBJECTS, OBJECTS)
def test_a_sealed_object_is_known_by_its_seal(content: dict[str, Any], other: Any) -> None:
    content.pop("sha256", None)
    back = parse_json_object(json.dumps(sealed(content, "more")))
    assert is_as_sealed(back, "more")
    assert not is_as_sealed(back)
    changed = {**other, "sha256": back["sha256"]}
    assert is_as_sealed(changed, "more") == (changed == back and repr(changed) == repr(back))


@few
@given(about=OBJECTS)
def test_a_manifest_says_what_was_written(about: dict[str, Any]) -> None:
    kept = {f"x{name}": value for name, value in about.items()}
    with tempfile.TemporaryDirectory() as folder:
        with RunDirectory(folder).opened(kept):
            pass
        found = read_manifest(Path(folder))
    assert found is not None
    assert {name: found[name] for name in kept} == kept
    assert found["status"] == "done"


@few
@given(
    step=st.integers(0, 10**8 - 1),
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=6),
        st.lists(st.integers(0, 3), max_size=3),
        max_size=4,
    ),
    state=OBJECTS,
)
def test_a_checkpoint_says_what_was_saved(
    step: int, shapes: dict[str, list[int]], state: dict[str, Any]
) -> None:
    import torch

    shapes.pop("__metadata__", None)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        own = Checkpoints(Path(folder), "a" * 32)
        own.save(Checkpoint(step, tensors, state))
        found = own.newest()
    assert found is not None
    assert (found.step, found.state) == (step, state)
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_no_number_that_is_not_finite_is_saved_anywhere(number: float, tmp_path: Path) -> None:
    import torch

    from distillation.finished_run import fill_folder
    from distillation.utils.checkpoint import save_checkpoint
    from tests.evaluation_samples import byte_tokenizer, student

    model = student()
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] = number
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = RunDirectory(tmp_path)
    writes = (
        lambda: save_checkpoint(model, tmp_path / "x.pt"),
        lambda: run.write_folder(
            "final", lambda place: fill_folder(model, byte_tokenizer(), place)
        ),
        lambda: Checkpoints(tmp_path / "checkpoints", "a" * 32).save(Checkpoint(1, state, {})),
    )
    for write in writes:
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            write()
    assert list(tmp_path.iterdir()) == []


@few
@given(st.text(max_size=60), st.integers(4, 40))
def test_cleaned_text_is_clean_and_no_longer(text: str, limit: int) -> None:
    for cleaned in (clean_text(text), clean_line(text, limit)):
        assert not {c for c in cleaned if ord(c) < 32 and c not in "\n\t"}
        assert "\x7f" not in cleaned
        assert clean_text(cleaned) == cleaned
    assert len(clean_line(text, limit)) <= limit
    assert "\n" not in clean_line(text, limit)
