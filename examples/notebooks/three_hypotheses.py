# %% [markdown]
# # The three hypotheses, small
#
# 1. Block-by-block distillation transfers knowledge.
# 2. Stitching layers bridge a difference of widths.
# 3. A separate training of the head improves the final model.
#
# Each is tried with one seed and a few minutes of training in all, on students of 6 x 64 from the
# built-in teacher of 6 x 192. One seed can show that a thing works at all, and how large a
# difference is; it cannot show that a small difference is not chance. `docs/results.md` has five
# seeds, budgets of equal operations and intervals, by `python -m benchmarks.quality arms`.

# %%
from typing import Any

import torch

from cleangpt.data import DistillationDataCollator, TextDataset, load_texts, make_dataloader
from cleangpt.teacher import load_teacher
from config_distillation import GPTConfig
from distillation import DistillationTrainer
from distillation.evaluation import EvaluationSettings, evaluate
from distillation.evaluation.tables import text_table
from model import build_student

DOCUMENTS = 24
TEST_DOCUMENTS = 3
FOLDER = "runs/notebooks/hypotheses"

teacher = load_teacher("builtin")
texts = load_texts("builtin", max_samples=DOCUMENTS).texts
loader = make_dataloader(
    TextDataset(texts, teacher.tokenizer, block_size=64),
    DistillationDataCollator(teacher.tokenizer, block_size=64),
    batch_size=16,
)
test_texts = load_texts("builtin", split="test", max_samples=TEST_DOCUMENTS).texts
rows: list[tuple[str, ...]] = []


# %% [markdown]
# ## One arm
#
# The same student and the same order of data every time. What an arm spends is counted by its plan,
# in operations, so that a gain can be told from a longer training. What counts in the end is the
# loss on test text, not that of the training, and with the stitches thrown away.


# %%
def arm(number: int, name: str, training: dict[str, Any], **options: Any) -> float:
    """Distil a new student in one way, and return its test loss in nats per token."""
    torch.manual_seed(1)
    config = GPTConfig(
        model_type="Vanilla", vocab_size=2048, n_layer=6, n_embd=64, n_head=4, block_size=64,
        dropout=0.0,
    )  # fmt: skip
    student = build_student(config)
    trainer = DistillationTrainer(
        teacher.model,
        student,
        teacher.tokenizer,
        loader,
        output_dir=f"{FOLDER}/{len(rows)}",
        overwrite=True,
        **{"logit_loss_temperature": 1.0, "distill_loss_type": "nmse", **options},
    )
    names = ("epochs_per_block", "train_lm_head", "lm_head_epochs", "polish_epochs")
    plan = trainer.plan(**{name: training[name] for name in names if name in training})
    spent = sum(stage.flops[0] for stage in plan.stages) / 1e12
    trainer.train(**{"lr_per_block": 3e-3, "lm_head_lr": 2e-3, "polish_lr": 3e-3, **training})
    settings = EvaluationSettings(max_tokens=5_000, max_hidden_tokens=512, speed_seconds=0.0)
    report = evaluate(student, teacher.model, teacher.tokenizer, test_texts, settings=settings)
    quality = report["models"][1]["quality"]
    rows.append(
        (
            f"H{number} {name}",
            f"{spent:.2f}",
            f"{quality['loss_nats']:.3f}",
            f"{quality['perplexity']:.1f}",
            f"{quality['kl_nats']:.3f}",
        )
    )
    return quality["loss_nats"]


# %% [markdown]
# ## H1: blocks first, or logits alone
#
# From random weights. The arm without blocks gets more epochs on the logits, so that it spends
# about as much.

# %%
LEAST_SQUARES = {"stitch_start": "least_squares"}
blocks_first = {"epochs_per_block": 1, "lm_head_epochs": 0, "polish_epochs": 2}
logits_only = arm(
    1,
    "logits alone",
    {"epochs_per_block": 0, "train_lm_head": False, "polish_epochs": 3},
)
staged = arm(1, "blocks, then logits", blocks_first, **LEAST_SQUARES)

# %% [markdown]
# ## H2: what a stitch has to do
#
# Without logits afterwards, which would make up for a bad stitch: blocks and the closed-form head
# only.

# %%
only_blocks = {"epochs_per_block": 2, "lm_head_epochs": 0}
fixed_random = arm(2, "random stitches, fixed", only_blocks, train_stitches=False)
arm(2, "random stitches, trained", only_blocks)
fitted = arm(2, "least-squares stitches, trained", only_blocks, **LEAST_SQUARES)

# %% [markdown]
# ## H3: a head phase of its own
#
# Both start from the same blocks and the same closed-form head; the one trains head and final norm
# alone for two of its epochs, the other gives all of them to the whole student.

# %%
with_phase = arm(
    3,
    "head 2 epochs, whole 2",
    {"epochs_per_block": 1, "lm_head_epochs": 2, "polish_epochs": 2},
    **LEAST_SQUARES,
)
without_phase = arm(
    3,
    "whole 3 epochs",
    {"epochs_per_block": 1, "lm_head_epochs": 0, "polish_epochs": 3},
    **LEAST_SQUARES,
)

# %% [markdown]
# ## The table
#
# Operations are of the training, with frozen states kept. The teacher's own loss is what is left
# when nothing is lost.

# %%
settings = EvaluationSettings(max_tokens=5_000, max_hidden_tokens=512, speed_seconds=0.0)
itself = evaluate(teacher.model, teacher.model, teacher.tokenizer, test_texts, settings=settings)
quality = itself["models"][0]["quality"]
shown = [*rows, ("teacher", "", f"{quality['loss_nats']:.3f}", f"{quality['perplexity']:.1f}", "0")]
print(text_table(("arm", "TFLOP", "test loss", "perplexity", "KL to teacher"), shown))

# %%
differences = (
    ("H1: blocks first, against logits alone", staged - logits_only),
    ("H2: fitted and trained stitches, against fixed random ones", fitted - fixed_random),
    ("H3: with a head phase, against without", with_phase - without_phase),
)
for what, difference in differences:
    print(f"{what}: {difference:+.3f} nats per token")

# %% [markdown]
# ## What this shows, and what not
#
# Seeds move a test loss here by some hundredths of a nat (`docs/results.md`). A difference of a
# tenth and more in one seed is worth believing in as a direction, one of a hundredth is not.
# Another budget, teacher or kind of student may give another answer: with a student that starts
# from the teacher's weights, the gain of blocks first shrinks to hundredths. And nothing here says
# that a separate head phase is what helps, if it does: it also spends operations of its own, which
# the table has in its second column.
