"""The shipped teacher against its card, and the command that makes it."""

import math
import re
from pathlib import Path

import pytest
import torch

from cleangpt.builtin import builtin_teacher_path, builtin_texts
from cleangpt.builtin.corpus import corpus_fingerprint
from cleangpt.builtin.pretraining import (
    batch_at,
    initial_state,
    learning_rate,
    load_checkpoint,
    mean_loss,
)
from cleangpt.builtin.settings import PretrainingSettings
from cleangpt.builtin.tokenizer import token_stream, train_tokenizer
from cleangpt.builtin.train import FLAGS, build_parser, main
from cleangpt.errors import CheckpointError, UsageError

TINY = [
    *("--steps", "3", "--batch_size", "2", "--context_length", "16", "--vocab_size", "300"),
    *("--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--eval_every", "1", "--no_bf16"),
]


@pytest.fixture(scope="module")
def teacher():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(builtin_teacher_path()).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(builtin_teacher_path())


@pytest.fixture(scope="module")
def few_texts() -> dict[str, list[str]]:
    return {
        split: [text[:2000] for text in builtin_texts(split)[:3]]
        for split in ("train", "validation", "test")
    }


@pytest.fixture
def _short_corpus(few_texts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cleangpt.builtin.builtin_texts", few_texts.__getitem__)
    monkeypatch.setattr("cleangpt.builtin.export.builtin_texts", few_texts.__getitem__)


# The shipped files --------------------------------------------------------------------------------


def test_the_assets_are_complete_and_small() -> None:
    folder = builtin_teacher_path()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes.keys() >= {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert sum(sizes.values()) <= 8_000_000


def test_the_teacher_is_a_float32_gpt2_with_a_tied_head(teacher) -> None:
    from transformers import GPT2LMHeadModel

    assert isinstance(teacher, GPT2LMHeadModel)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert teacher.lm_head.weight is teacher.transformer.wte.weight
    assert all(parameter.isfinite().all() for parameter in teacher.parameters())


def test_the_tokenizer_returns_any_text_exactly(tokenizer, teacher) -> None:
    for text in (
        builtin_texts("test")[0],
        "tabs\tand\r\n  spaces ",
        "na\u00efve \u2603 \U0001f600",
    ):
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text
    assert len(tokenizer) == teacher.config.vocab_size
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == teacher.config.eos_token_id
    assert tokenizer.model_max_length == teacher.config.n_positions


@pytest.fixture(scope="module")
def claimed() -> tuple[int, float]:
    """Tokens and perplexity of the test split, as the card has them."""
    card = (builtin_teacher_path() / "README.md").read_text(encoding="utf-8")
    row = re.search(r"\| test \| \d+ \| ([\d,]+) \| ([\d.]+) \| [\d.]+ \|", card)
    assert row is not None
    return int(row[1].replace(",", "")), float(row[2])


@pytest.fixture(scope="module")
def same_text() -> bool:
    """Whether this Python carries the text that the card was measured on; others differ."""
    return corpus_fingerprint() in (builtin_teacher_path() / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_the_perplexity_is_near_the_one_on_the_card(teacher, tokenizer, claimed, same_text) -> None:
    length = teacher.config.n_positions
    stream = token_stream(tokenizer, builtin_texts("test"))
    if same_text:
        assert stream.numel() - 1 == claimed[0]
    # Windows side by side: half the work of the card's overlapping ones, and less context.
    ratio = math.exp(mean_loss(teacher, stream, length, length - 1)) / claimed[1]
    assert 1.0 < ratio < 1.1 if same_text else 0.85 < ratio < 1.25


@pytest.mark.slow
def test_the_card_tells_the_truth(teacher, tokenizer, claimed, same_text) -> None:
    length = teacher.config.n_positions
    stream = token_stream(tokenizer, builtin_texts("test"))
    perplexity = math.exp(mean_loss(teacher, stream, length, length // 2))
    assert perplexity == pytest.approx(claimed[1], rel=0.002 if same_text else 0.15)


def test_the_teacher_completes_a_docstring(teacher, tokenizer) -> None:
    ids = tokenizer("Raises ValueError if the", return_tensors="pt")
    output = teacher.generate(
        **ids, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    assert output.shape[1] > ids["input_ids"].shape[1]
    # The most frequent continuations of a model that has learnt anything are words of the text.
    assert re.search(r"[a-z]{3,}", tokenizer.decode(output[0, ids["input_ids"].shape[1] :]))


# The command --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_short_corpus")
def test_a_resumed_run_equals_a_straight_one(tmp_path: Path, monkeypatch) -> None:
    main([*TINY, "--output_dir", str(tmp_path / "straight")])

    from cleangpt.builtin import pretraining

    real_save = pretraining.save_checkpoint

    class KilledError(Exception):
        pass

    def save_and_die(state, settings, path) -> None:
        real_save(state, settings, path)
        raise KilledError

    monkeypatch.setattr(pretraining, "save_checkpoint", save_and_die)
    for _ in range(3):
        with pytest.raises(KilledError):
            main([*TINY, "--output_dir", str(tmp_path / "resumed")])

    straight = torch.load(tmp_path / "straight" / "checkpoint.pt", weights_only=True)
    resumed = torch.load(tmp_path / "resumed" / "checkpoint.pt", weights_only=True)
    for part in ("model", "average", "best_weights"):
        assert straight[part].keys() == resumed[part].keys()
        for name, weight in straight[part].items():
            assert torch.equal(weight, resumed[part][name]), f"{part}: {name}"


@pytest.mark.usefixtures("_short_corpus")
def test_the_command_writes_a_teacher_that_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main([*TINY, "--output_dir", str(tmp_path)])
    folder = tmp_path / "teacher"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.n_positions == tokenizer.model_max_length == 16
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.isascii()
    assert "--steps 3" in card
    assert "--no_bf16" in card
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.usefixtures("_short_corpus")
def test_other_settings_and_damage_are_refused(tmp_path: Path) -> None:
    main([*TINY, "--output_dir", str(tmp_path)])
    with pytest.raises(CheckpointError, match=r"learning_rate 0.0025 -> 0.01.*\n.*--output_dir"):
        main([*TINY, "--learning_rate", "0.01", "--output_dir", str(tmp_path)])
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        main([*TINY, "--output_dir", str(tmp_path)])


def test_every_setting_has_a_flag_with_its_default() -> None:
    from dataclasses import asdict

    flags = vars(build_parser().parse_args([]))
    assert {*FLAGS, "bf16"} == asdict(PretrainingSettings()).keys()
    assert {name: flags[name] for name in asdict(PretrainingSettings())} == asdict(
        PretrainingSettings()
    )


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"n_head": 5}, "--n_embd"),
        ({"vocab_size": 100}, "--vocab_size"),
        ({"context_length": 1}, "--context_length"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting, flag) -> None:
    with pytest.raises(UsageError, match=flag):
        PretrainingSettings(**setting)


# Its parts ----------------------------------------------------------------------------------------


def test_batches_and_rates_are_functions_of_the_step() -> None:
    settings = PretrainingSettings(
        steps=100, warmup_steps=10, cooldown=0.4, learning_rate=1.0, context_length=8, batch_size=3
    )
    stream = torch.arange(100)
    first, again = batch_at(5, stream, settings), batch_at(5, stream, settings)
    assert torch.equal(first, again)
    assert not torch.equal(first, batch_at(6, stream, settings))
    assert torch.equal(first[:, 1:], first[:, :-1] + 1)
    rates = [learning_rate(step, settings) for step in (0, 4, 9, 30, 59, 80, 99, 100)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.025, 0.0])


@pytest.mark.parametrize(
    ("tokens", "length", "stride"), [(50, 16, 8), (50, 16, 15), (9, 16, 4), (17, 16, 1)]
)
def test_each_token_is_scored_once_with_enough_context(tokens, length, stride) -> None:
    settings = PretrainingSettings(vocab_size=300, context_length=16, n_layer=1, n_embd=8, n_head=2)
    model = initial_state(settings, 0).average
    stream = torch.randint(0, 300, (tokens,), generator=torch.Generator().manual_seed(0))
    total = 0.0
    for target in range(1, tokens):
        # The first window, of those that begin at a multiple of the stride, that has the target.
        start = max(0, math.ceil((target + 1 - length) / stride) * stride)
        start = min(start, max(0, tokens - length))
        log_probs = model(stream[None, start:target]).logits[0, -1].log_softmax(-1)
        total -= float(log_probs[stream[target]])
    assert mean_loss(model, stream, length, stride) == pytest.approx(total / (tokens - 1), rel=1e-5)


def test_a_checkpoint_restores_the_state(tmp_path: Path, few_texts) -> None:
    from cleangpt.builtin.pretraining import train

    settings = PretrainingSettings(
        vocab_size=300, context_length=8, n_layer=1, n_embd=8, n_head=2, steps=2, bf16=False
    )
    tokenizer = train_tokenizer(few_texts["train"], 300, 8)
    streams = {split: token_stream(tokenizer, texts)[:200] for split, texts in few_texts.items()}
    state = initial_state(settings, 0)
    train(state, settings, streams, tmp_path / "checkpoint.pt")
    other = initial_state(settings, 0)
    load_checkpoint(other, settings, tmp_path / "checkpoint.pt")
    assert (other.step, other.best_step, other.best_loss) == (2, state.best_step, state.best_loss)
    train(other, settings, streams, tmp_path / "untouched.pt", minutes=0.0)
    assert not (tmp_path / "untouched.pt").exists()
