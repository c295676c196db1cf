"""The tutorial's Python blocks run as printed, in its order, on a tiny teacher named ``gpt2``.

Textual changes are limited to what no reader would run unchanged either: the device, and the lines
the tutorial leaves out (``# ... other arguments``).
"""

import copy
import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.contract.documents import Block, read_blocks, run_block
from tests.contract.local_hub import STORIES, save_tiny_gpt2
from tests.contract.source_tree import ROOT

TUTORIAL = ROOT.parent / "shared" / "tutorial.md"
pytestmark = pytest.mark.skipif(
    not TUTORIAL.is_file(), reason="the tutorial's text is not beside the repository"
)

SUPPLIED = {
    'torch.device("cuda")': 'torch.device("cpu")',
    "# ... other arguments": (
        "teacher_model=teacher_model, student_model=student_model, tokenizer=tokenizer,\n"
        "    train_dataloader=train_dataloader,"
    ),
    "# ... backbone parameters": "epochs_per_block=1, lr_per_block=1e-3,",
    "# ... training step ...": "loss = torch.tensor(float(step))",
}
# Each block of the page by a phrase that only it contains.
BLOCK_PHRASES = {
    "config": "# Context window size",
    "setup": "# 6. Run distillation",
    "stitching": "# Enable stitching layers in the DistillationTrainer",
    "stitching class": "# From stitching_layers.py",
    "head": "# Train the LM head",
    "custom student": "model_my_custom_distillation.py",
    "registry": "def get_model_class",
    "custom loss": "class MyCustomDistillationLoss",
    "custom trainer": "class CustomBackboneTrainer",
    "small model": "# Use fewer layers for debugging",
    "debug logging": "logging.basicConfig",
    "monitoring": "for epoch in range(num_epochs)",
    "pictures": "import matplotlib.pyplot",
}


def tutorial_blocks() -> dict[str, Block]:
    blocks = read_blocks(TUTORIAL, "python")
    return {
        name: next(block for block in blocks if phrase in block.code)
        for name, phrase in BLOCK_PHRASES.items()
    }


class Reader:
    """Someone who types the tutorial into one interpreter, block after block."""

    def __init__(self) -> None:
        from torch.utils.data import DataLoader

        from examples.run_distillation_example import DistillationDataCollator, TextDataset

        self.blocks = tutorial_blocks()
        self.names: dict[str, Any] = {
            "__name__": "tutorial",
            "DataLoader": DataLoader,
            "DistillationDataCollator": DistillationDataCollator,
            "TextDataset": TextDataset,
            "texts": STORIES[:4],
        }

    def types(self, name: str) -> dict[str, Any]:
        block = self.blocks[name]
        code = block.code
        for printed, supplied in SUPPLIED.items():
            code = code.replace(printed, supplied)
        run_block(block, self.names, TUTORIAL, code)
        return self.names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tutorial")
    save_tiny_gpt2(place / "gpt2")
    return place


@pytest.fixture(scope="module")
def setup_done(folder: Path) -> Reader:
    """A reader who has run the basic setup, shared by the tests that build on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        reader = Reader()
        reader.types("config")
        reader.types("setup")
    return reader


@pytest.fixture
def reader(setup_done: Reader, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    fresh = copy.copy(setup_done)
    fresh.names = dict(setup_done.names)
    fresh.names["student_model"] = copy.deepcopy(setup_done.names["student_model"])
    return fresh


def test_every_python_block_is_covered() -> None:
    covered = {block.line for block in tutorial_blocks().values()}
    assert covered == {block.line for block in read_blocks(TUTORIAL, "python")}


def test_basic_setup_distils(setup_done: Reader, folder: Path) -> None:
    results = setup_done.names["results"]
    assert {"backbone_losses", "head_loss"} <= set(results)
    assert len(results["backbone_losses"]) == setup_done.names["teacher_model"].config.n_layer
    assert results["head_loss"] == pytest.approx(float(results["head_loss"]), nan_ok=False)
    output = folder / "distilled_model_output"
    assert (output / "student_model_final_distilled.pt").is_file()
    assert (output / "final" / "config.json").is_file()


def test_stitching_options(reader: Reader) -> None:
    trainer = reader.types("stitching")["distill_trainer"]
    assert trainer is not None


def test_stitching_layer_is_the_printed_class(reader: Reader) -> None:
    import torch
    from torch import nn

    from stitching_layers import StitchingLayer

    reader.names["nn"] = nn
    printed_class = reader.types("stitching class")["StitchingLayer"]
    for dims in ((4, 4, True), (4, 4, False), (3, 5, True), (5, 3, False)):
        torch.manual_seed(0)
        printed = printed_class(*dims).state_dict()
        torch.manual_seed(0)
        ours = StitchingLayer(*dims).state_dict()
        assert list(printed) == list(ours)
        assert all(torch.equal(printed[key], ours[key]) for key in printed), dims


def test_head_options(reader: Reader) -> None:
    reader.types("stitching")
    assert "head_loss" in reader.types("head")["results"]


def test_custom_student_registers_and_trains(reader: Reader) -> None:
    import torch

    from distillation import DistillationTrainer
    from model.model_SASPV_distillation import SASPTransformerModelDistillation

    names = reader.types("custom student")
    names["SASPTransformerModelDistillation"] = SASPTransformerModelDistillation
    get_model_class = reader.types("registry")["get_model_class"]
    custom = get_model_class("MyCustom")
    assert get_model_class("sasp") is SASPTransformerModelDistillation
    with pytest.raises(ValueError, match="Unsupported student model type: other"):
        get_model_class("other")

    config = dataclasses.replace(names["student_config"], n_embd=24, n_head=2)
    student = custom(config)
    assert student.get_num_params() == sum(p.numel() for p in student.parameters())
    results = DistillationTrainer(
        names["teacher_model"],
        student,
        names["tokenizer"],
        names["train_dataloader"],
        output_dir="custom_student",
    ).train(epochs_per_block=1, lr_per_block=1e-3)
    assert len(results["backbone_losses"]) == config.n_layer
    ids = torch.tensor([[1, 2, 3]])
    output = student(ids)
    assert output.hidden_states is not None, "its forward asks for hidden states by default"
    assert student.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


def write_custom_loss(reader: Reader, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tutorial puts it into distillation/losses; here that package gets a second folder."""
    import distillation.losses

    block = reader.blocks["custom loss"]
    (folder / "my_custom_loss.py").write_text(block.code, encoding="utf-8")
    search_path = [*distillation.losses.__path__, str(folder)]
    monkeypatch.setattr(distillation.losses, "__path__", search_path)


def test_custom_loss_in_a_custom_trainer(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from distillation.trainers import BackboneDistillationTrainer

    write_custom_loss(reader, tmp_path, monkeypatch)
    reader.names["BackboneDistillationTrainer"] = BackboneDistillationTrainer
    names = reader.types("custom trainer")
    shapes: list[tuple[int, ...]] = []
    names["custom_loss"].register_forward_pre_hook(
        lambda _module, inputs: shapes.append(tuple(inputs[0].shape))
    )
    before = copy.deepcopy(names["student_model"].state_dict())
    trainer = names["CustomBackboneTrainer"](
        names["teacher_model"],
        names["student_model"],
        names["tokenizer"],
        names["train_dataloader"],
        output_dir=str(tmp_path / "out"),
    )
    trainer.train_backbone(epochs_per_block=1, lr_per_block=1e-3)
    assert shapes, "the assigned loss is the one that trains"
    assert all(shape[-1] == 48 and len(shape) == 2 for shape in shapes), "valid positions only"
    after = names["student_model"].state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_two_block_student_under_a_deeper_teacher(reader: Reader) -> None:
    names = reader.types("small model")
    teacher = names["teacher_model"]
    config = dataclasses.replace(
        names["student_config"], vocab_size=teacher.config.vocab_size, model_type="Vanilla"
    )
    from distillation import DistillationTrainer
    from model.model_vanilla_distillation import VanillaTransformerModelDistillation

    results = DistillationTrainer(
        teacher,
        VanillaTransformerModelDistillation(config),
        names["tokenizer"],
        names["train_dataloader"],
        output_dir="two_blocks",
    ).train(epochs_per_block=1, lr_per_block=1e-3)
    assert teacher.config.n_layer == 3
    assert len(results["backbone_losses"]) == 2


def test_debugging_snippets(
    reader: Reader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        reader.types("debug logging")
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
    reader.names.update(num_epochs=2, dataloader=reader.names["train_dataloader"], torch=torch)
    reader.types("monitoring")
    assert "Epoch 1, Step 0, Loss: 0.0" in capsys.readouterr().out

    names = reader.names
    ids = names["tokenizer"](STORIES[0][:60], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for model, name in (("student_model", "student"), ("teacher_model", "teacher")):
            states = names[model](input_ids=ids, output_hidden_states=True).hidden_states
            names[f"{name}_hidden_state"] = torch.stack(states)  # [level, batch, seq, dim]
    names.update(block_idx=0, epoch=1)
    reader.types("pictures")
    assert (tmp_path / "hidden_states_block_0_epoch_1.png").stat().st_size > 1000


def test_the_listed_options_are_keywords() -> None:
    """The page's option lists name keywords that exist."""
    from distillation import DistillationTrainer

    lines = TUTORIAL.read_text(encoding="utf-8").split("## Distillation Options")[1]
    listed = [
        line.split("`")[1]
        for line in lines.split("## Advanced Features")[0].splitlines()
        if line.startswith("- `")
    ]
    known = {
        *inspect.signature(DistillationTrainer.__init__).parameters,
        *inspect.signature(DistillationTrainer.train).parameters,
    }
    # The page calls it lr_per_block and initialize_head_from_teacher; both are in train().
    assert len(listed) == 17
    assert set(listed) <= known
