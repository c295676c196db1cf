"""Teachers with more vocabulary rows than tokens: the same lessons as without the padding."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from cleangpt.blocks import BlockStack
from cleangpt.errors import InputError
from distillation.activations import Activations
from distillation.batch import as_batch
from distillation.head_init import copy_head, fit_head, untie_lm_head
from distillation.logit_stages import HeadStage
from distillation.losses import LogitDistillationLoss
from distillation.teacher_init import init_from_teacher
from distillation.trainers import HeadDistillationTrainer
from tests.builders import CONTEXT, VOCAB, WIDTH, batches, tiny_student, tiny_teacher

PADDING = 61
SHAPE = {"n_embd": WIDTH, "n_head": 4, "n_layer": 3, "bias": True}
BATCH = as_batch(batches(1)[0], torch.device("cpu"))


def padded_teacher() -> Any:
    """The tiny teacher with rows that no token has, and that are likelier than any token."""
    teacher = tiny_teacher()
    rows = torch.cat([teacher.lm_head.weight, 9 * torch.randn(PADDING, WIDTH)]).detach()
    teacher.transformer.wte = torch.nn.Embedding(VOCAB + PADDING, WIDTH, _weight=rows)
    teacher.lm_head = torch.nn.Linear(WIDTH, VOCAB + PADDING, bias=False)
    teacher.lm_head.weight = teacher.transformer.wte.weight
    teacher.config.vocab_size = VOCAB + PADDING
    return teacher.eval()


@pytest.fixture(scope="module")
def teachers() -> tuple[Any, Any]:
    torch.manual_seed(4)
    return tiny_teacher(), padded_teacher()


@pytest.mark.parametrize("kind", ["kl_div", "mse", "ce"])
@pytest.mark.parametrize("rank", [None, 8])
def test_losses_and_gradients_are_those_without_the_padding(
    kind: str, rank: int | None, teachers: tuple[Any, Any]
) -> None:
    found = []
    for teacher in teachers:
        student = BlockStack(tiny_student(head_rank=rank))
        untie_lm_head(student)
        states = Activations(BlockStack(teacher), student, 0)
        loss = HeadStage(states, LogitDistillationLoss(kind), loss_weight=1.0).loss(BATCH)
        loss.backward()
        gradients = [p.grad for p in student.lm_head.parameters()]
        found.append((loss.detach(), *gradients))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_every_start_is_the_one_without_the_padding(teachers: tuple[Any, Any]) -> None:
    found = []
    for teacher in map(BlockStack, teachers):
        copied, fitted, begun = (BlockStack(tiny_student(**SHAPE)) for _ in range(3))
        for student in (copied, fitted, begun):
            untie_lm_head(student)
        copy_head(teacher, copied)
        fit_head(Activations(teacher, fitted, 0), [BATCH], 10**6)
        lines = init_from_teacher(teacher, begun, range(3), "layers", None)
        assert "final norm and head" in lines
        states = [s.model.state_dict() for s in (copied, fitted, begun)]
        found.append(states)
        ids = BATCH.input_ids
        with torch.no_grad():
            logits = begun.model.eval()(ids).logits
            torch.testing.assert_close(
                logits, teacher.logits(ids)[..., :VOCAB], rtol=1e-5, atol=1e-5
            )
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_where_the_tokens_are_as_many_nothing_is_said(
    teachers: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="distillation.preflight"):
        HeadDistillationTrainer(teachers[0], tiny_student(), None, batches())
        assert caplog.messages == []
        HeadDistillationTrainer(teachers[1], tiny_student(vocab_size=VOCAB + PADDING), None, [])
        assert caplog.messages == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 258 tokens and 320 rows, and a text."""
    from tests.saved_teachers import build, save

    place = tmp_path_factory.mktemp("padded")
    model = build("gpt2")
    model.resize_token_embeddings(320, mean_resizing=False)
    save(place / "teacher", model)
    text = "\n\n".join(f"line {i} of a small text to learn from" for i in range(60))
    (place / "text.txt").write_text(text)
    return place


def run(place: Path, name: str, *flags: str) -> Path:
    from examples import run_distillation_example as command

    arguments = ["--teacher_model_name_or_path", str(place / "teacher"), "--device", "cpu"]
    arguments += ["--dataset_name", str(place / "text.txt"), "--block_size", "16"]
    arguments += ["--output_dir", str(place / name), "--epochs_per_block", "1"]
    command.main([*arguments, "--lm_head_epochs", "1", *flags])
    return place / name


def test_a_run_gives_its_student_the_tokens_alone(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="distillation.preflight"):
        folder = run(place, "run", "--student_n_embd", "16")
    lines = [message for message in caplog.messages if message.startswith("Vocabulary")]
    assert lines == [
        "Vocabulary: the teacher has 320 rows and the student 258; logits are compared, and rows"
        " taken over, on the first 258."
    ]
    assert json.loads((folder / "final" / "config.json").read_text())["vocab_size"] == 258


def test_a_configuration_without_a_vocabulary_gets_the_teachers(place: Path) -> None:
    from transformers import LlamaConfig

    from cleangpt.teacher import load_teacher
    from distillation.commands.student import hf_student

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**small, num_attention_heads=2, max_position_embeddings=CONTEXT)
    fields = {k: v for k, v in config.to_dict().items() if k != "vocab_size"}
    (place / "llama.json").write_text(json.dumps(fields))
    student = hf_student(str(place / "llama.json"), load_teacher(str(place / "teacher")))
    assert student.config.vocab_size == 258


@pytest.mark.parametrize("weights", [True, False])
def test_a_student_of_other_tokens_is_refused(weights: bool, place: Path) -> None:
    from tests.byte_tokenizer import make_tokenizer
    from tests.saved_teachers import build

    folder = place / f"other-{weights}"
    model = build("gpt2")
    model.save_pretrained(folder) if weights else model.config.save_pretrained(folder)
    tokenizer = make_tokenizer(eos_token="<end>")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    starts = [["--student_model_type", "hf", "--student_config", str(folder)]]
    starts += [["--start_student", str(folder)]] * weights
    for start in starts:
        with pytest.raises(InputError, match=r"2 ids differ, first \d+ \('b', not 'a'\)") as caught:
            run(place, "refused", *start)
        assert caught.value.exit_code == 3
