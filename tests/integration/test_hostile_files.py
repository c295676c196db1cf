"""Files made to harm: no code runs, nothing is built that they do not hold, all are refused."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.cli import run_command
from cleangpt.errors import CheckpointError, CleanGPTError, InputError
from cleangpt.integrity import sealed
from cleangpt.runtime.module_state import tensors_fingerprint
from cleangpt.teacher import load_teacher
from cleangpt.weight_files import check_file
from distillation.evaluation.loading import load_model
from distillation.utils.checkpoint import load_checkpoint

STUDENT_FILE = "student_model_final_distilled.pt"
DEEP = "[" * 100_000


class Canary:
    """Touches a file when it is unpickled without restriction."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.evaluation_samples import PROSE, save_run, save_teacher

    root = tmp_path_factory.mktemp("hostile")
    save_run(root / "run")
    save_teacher(root / "teacher")
    (root / "text").mkdir()
    (root / "text" / "test.txt").write_text("\n\n\n".join(PROSE))
    return root


@pytest.fixture
def teacher(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "teacher", tmp_path / "teacher"))


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a file has run"


@pytest.fixture
def little_memory() -> Any:
    """Two gigabytes more than now: what a bomb would take fails, and fails at once."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def evaluate(made: Path, model: Path, teacher: Path | None = None) -> int:
    from distillation.evaluation.evaluate_distilled_model import main

    flags = {
        "--model_path": str(model),
        "--teacher_model_name": str(teacher or made / "teacher"),
        "--dataset_name": str(made / "text"),
        "--speed_seconds": "0",
        "--max_tokens": "40",
        "--device": "cpu",
    }
    return run_command(main, [part for pair in flags.items() for part in pair])


def save_with(folder: Path, change: dict[str, Any]) -> Path:
    """A student's file whose configuration says something else, and whose checksum is right."""
    from tests.evaluation_samples import student

    model = student()
    state = model.state_dict()
    about = {
        "format_version": 2,
        "model_class": type(model).__name__,
        "model_type": "Vanilla",
        "config": {**model.config.to_dict(), **change},
    }
    metadata = json.dumps(sealed(about, tensors_fingerprint(state.items())))
    torch.save({"model_state_dict": state, "metadata": metadata}, folder / "x.pt")
    return folder / "x.pt"


def two_lines(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert "defect of ours" not in shown
    *_, cause, remedy = shown.splitlines()
    assert cause.startswith("error: ")
    assert remedy.startswith("fix: ")
    return cause


def as_torch_saves(evil: Any, path: Path) -> None:
    torch.save({"model_state_dict": {"w": evil}, "metadata": "{}"}, path)


def as_torch_once_saved(evil: Any, path: Path) -> None:
    torch.save(evil, path, _use_new_zipfile_serialization=False)


def as_a_plain_pickle(evil: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(evil))


PICKLES = pytest.mark.parametrize("write", [as_torch_saves, as_torch_once_saved, as_a_plain_pickle])


@PICKLES
def test_a_pickle_as_a_student_never_runs(
    made: Path, tmp_path: Path, canary: Path, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write(Canary(canary), tmp_path / "evil.pt")
    assert evaluate(made, tmp_path / "evil.pt") == 4
    assert "evil.pt" in two_lines(capsys)


@PICKLES
@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin"])
def test_a_pickle_in_a_teachers_folder_never_runs(
    teacher: Path, canary: Path, write: Any, name: str
) -> None:
    if name == "pytorch_model.bin":
        (teacher / "model.safetensors").unlink()
    write(Canary(canary), teacher / name)
    if name == "training_args.bin":
        load_teacher(str(teacher))  # nobody asked for it
        return
    with pytest.raises(InputError, match="cannot be read"):
        load_teacher(str(teacher))
    with pytest.raises(CleanGPTError):
        load_model(str(teacher))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_code_in_a_folder_does_not_run_unless_it_is_trusted(
    made: Path, teacher: Path, canary: Path, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (teacher / "own.py").write_text(f"open({str(canary)!r}, 'w')\n")
    path = teacher / "config.json"
    own = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "own.Own")
    config = {**json.loads(path.read_text()), "model_type": "own", "auto_map": own}
    path.write_text(json.dumps(config))
    code = evaluate(made, teacher) if role == "student" else evaluate(made, made / "run", teacher)
    assert code == 3
    assert "trust_remote_code" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("place", ["teacher", "folder", "pt"])
def test_a_configuration_chooses_no_kernel(
    made: Path, teacher: Path, tmp_path: Path, field: str, place: str
) -> None:
    """Such a name would be looked up on the hub, which the guard against the network sees."""
    if place == "pt":
        loaded = load_model(str(save_with(tmp_path, {field: "evil/kernel"}))).model
    else:
        path = teacher / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: "evil/kernel"}))
        loaded = load_teacher(str(teacher)).model if place == "teacher" else None
        loaded = loaded or load_model(str(teacher)).model
    config: Any = loaded.config
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/b", "..", "x" * 300, "a\0b"])
def test_a_chat_template_cannot_name_a_file_elsewhere(teacher: Path, name: str) -> None:
    path = teacher / "tokenizer_config.json"
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "harm"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    with pytest.raises(InputError, match="a chat template named"):
        load_teacher(str(teacher))


def test_chat_templates_of_plain_names_are_kept(teacher: Path, tmp_path: Path) -> None:
    path = teacher / "tokenizer_config.json"
    templates = [{"name": name, "template": "x"} for name in ("default", "tool_use", "rag-2.1")]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    load_teacher(str(teacher)).tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").is_file()


# Larger inside than outside -----------------------------------------------------------------------


def repacked(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> None:
    """A copy of an archive whose records are packed, and changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))


def test_a_packed_archive_is_not_unpacked(made: Path, tmp_path: Path, little_memory: None) -> None:
    path = tmp_path / "bomb.pt"

    def grow(name: str, content: bytes) -> bytes:
        return content + bytes(2**25) if name.endswith("data/0") else content

    repacked(made / "run" / STUDENT_FILE, path, grow)
    assert path.stat().st_size < 2**20
    with pytest.raises(CheckpointError, match="no file that PyTorch wrote"):
        load_checkpoint(path)


def test_a_tensor_is_no_larger_than_its_file(tmp_path: Path, little_memory: None) -> None:
    huge = {"w": torch.zeros(1).expand(10**6, 10**6)}
    about = {"format_version": 2, "config": {}}
    torch.save({"model_state_dict": huge, "metadata": json.dumps(about)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="tensors larger than the file"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(10**9, 10**9, device="meta"),
        lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (10**9, 10**9)),
        lambda: torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.quint8),
    ],
    ids=["meta", "sparse", "quantized"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_tensors_are_no_weights(
    tmp_path: Path, make: Callable[[], Any], little_memory: None
) -> None:
    content = {"model_state_dict": {"w": make()}, "metadata": '{"format_version": 2}'}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="checkpoint of this library"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9},
        {"n_embd": 2**20, "n_head": 2},
        {"vocab_size": 10**12},
        {"block_size": 10**12},
        {"n_layer": "many"},
        {"n_head": 0},
        {"n_embd": None},
        {"model_type": 5},
    ],
    ids=str,
)
def test_a_configuration_builds_nothing_that_the_file_does_not_hold(
    tmp_path: Path, change: dict[str, Any], little_memory: None
) -> None:
    with pytest.raises(CheckpointError, match=r"does not (describe|fit)"):
        load_model(str(save_with(tmp_path, change)))


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9},
        {"n_embd": 2**20},
        {"vocab_size": 10**12},
        {"n_positions": 10**12},
        {"n_layer": "many"},
        {"n_head": 0},
        {"n_embd": None},
        {"dtype": "evil"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"architectures": 5},
        {"auto_map": 5},
        {"rope_parameters": DEEP},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_neither_does_that_of_a_folder(
    teacher: Path, change: dict[str, Any], little_memory: None
) -> None:
    path = teacher / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    is_too_large = any(isinstance(value, int) and value >= 2**20 for value in change.values())
    for load in (load_teacher, load_model):
        with contextlib.suppress(InputError, CheckpointError):
            load(str(teacher))
            assert not is_too_large


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (struct.pack("<Q", 2**63), "header would take"),
        (struct.pack("<Q", 10**8), "header would take"),
        (struct.pack("<Q", 100_000) + DEEP.encode(), "damaged"),
        (struct.pack("<Q", 2) + b"[]", "lists no tensors"),
        (struct.pack("<Q", 2) + b"{", "header would take"),
        (b"\1\2", "damaged"),
    ],
)
def test_headers_of_safetensors_stay_within_the_file(
    teacher: Path, header: bytes, words: str
) -> None:
    (teacher / "model.safetensors").write_bytes(header)
    with pytest.raises(InputError, match=words):
        load_teacher(str(teacher))
    with pytest.raises(CheckpointError, match=words):
        load_model(str(teacher))


def gguf(fields: int, tensors: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


KEY = struct.pack("<Q", 1) + b"a"


@pytest.mark.parametrize(
    "content",
    [
        gguf(2**63, 0),
        gguf(1, 2**63),
        gguf(1, 0, struct.pack("<Q", 2**63)),
        gguf(1, 0, KEY + struct.pack("<IQ", 8, 2**63)),
        gguf(1, 0, KEY + struct.pack("<IIQ", 9, 4, 2**63)),
        gguf(1, 0, KEY + struct.pack("<IIQ", 9, 8, 2**63)),
        gguf(1, 0, KEY + struct.pack("<IIQ", 9, 9, 2**62)),
        gguf(1, 0, KEY + struct.pack("<I", 77)),
        gguf(20, 0, KEY),
        b"GGUF" + struct.pack("<I", 9),
        b"GGUF",
    ],
    ids=range(11),
)
def test_lengths_in_gguf_files_are_not_believed(tmp_path: Path, content: bytes) -> None:
    """The reader itself goes through 2^63 values of a file of 43 bytes."""
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.gguf"):
        check_file(tmp_path / "x.gguf")
    pytest.importorskip("gguf")
    with pytest.raises(InputError, match=r"x\.gguf"):
        load_teacher(str(tmp_path / "x.gguf"))


def test_sums_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    from cleangpt.integrity import check_sums

    (tmp_path / "folder").mkdir()
    for name in ("../secret", "/etc/hostname", "a/../../b", "a\0b"):
        (tmp_path / "folder" / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(CheckpointError, match="SHA256SUMS is damaged"):
            check_sums(tmp_path / "folder")
