# %% [markdown]
# # A first distillation in five minutes
#
# A teacher of 3.1 million parameters, trained on Python's own documentation, becomes a student of a
# third of its size. Teacher, tokenizer and text come with the library: no network is needed.

# %%
from cleangpt.data import DistillationDataCollator, TextDataset, load_texts, make_dataloader
from cleangpt.teacher import load_teacher
from config_distillation import GPTConfig
from distillation import DistillationTrainer
from distillation.evaluation import EvaluationSettings, evaluate
from model import build_student

DOCUMENTS = 40  # more is better and slower: `make demo` uses 100 of them
FOLDER = "runs/notebooks/first"

teacher = load_teacher("builtin")

# %% [markdown]
# ## The student
#
# Half as wide as the teacher, and as deep. The vocabulary is the teacher's, whose tokens it is to
# predict.

# %%
config = GPTConfig(
    model_type="Vanilla",
    vocab_size=teacher.model.config.vocab_size,
    n_layer=6,
    n_embd=96,
    n_head=6,
    dropout=0.0,
    block_size=128,
)
student = build_student(config)
config

# %% [markdown]
# ## The data
#
# Documents are packed into windows of 128 tokens. The order of batches is a function of the seed
# and the epoch, so that a run that was stopped can go on exactly.


# %%
def windows(split: str, documents: int) -> TextDataset:
    """Windows of the first documents of a split."""
    texts = load_texts("builtin", split=split, max_samples=documents).texts
    return TextDataset(texts, teacher.tokenizer, block_size=128)


collator = DistillationDataCollator(teacher.tokenizer, block_size=128)
loader = make_dataloader(windows("train", DOCUMENTS), collator, batch_size=8)
held_out = make_dataloader(windows("validation", 4), collator, batch_size=8)

# %% [markdown]
# ## What it will cost
#
# These are the settings of the recipe `best`, with the higher rates that so narrow a student takes:
# the student starts from the teacher's weights, each block then learns the teacher's hidden states,
# the head is computed, and at last the whole student learns the teacher's predictions.

# %%
trainer = DistillationTrainer(
    teacher.model,
    student,
    teacher.tokenizer,
    loader,
    output_dir=FOLDER,
    validation_dataloader=held_out,
    overwrite=True,  # so that this cell can be run again
    init_from_teacher="pca",
    stitch_start="least_squares",
    distill_loss_type="nmse",
    logit_loss_temperature=1.0,
    polish_hidden_weight=30.0,
)
trainer

# %%
trainer.plan(epochs_per_block=1, lm_head_epochs=0, polish_epochs=2)

# %% [markdown]
# ## Distil
#
# Interrupt the cell whenever you like: both models stay usable. With `resume=True` in place of
# `overwrite=True` the next call goes on where the last one stopped.

# %%
results = trainer.train(
    epochs_per_block=1, lr_per_block=3e-3, lm_head_epochs=0, polish_epochs=2, polish_lr=2e-3
)
results

# %% [markdown]
# `relative error` is the share of the teacher's variation that a block misses: 0 is perfect, 1 is
# what the teacher's mean state would reach.
#
# ## Is it any good?
#
# On text that neither model was trained on. The student before its distillation would have a
# perplexity near the size of the vocabulary, 2,048.

# %%
report = evaluate(
    student,
    teacher.model,
    teacher.tokenizer,
    load_texts("builtin", split="test", max_samples=4).texts,
    settings=EvaluationSettings(max_tokens=10_000, speed_seconds=1.0),
)
report

# %% [markdown]
# ## Use it
#
# It is a HuggingFace model. The folder `final` of the run holds it with its tokenizer.

# %%
prompt = teacher.tokenizer("Return a new list", return_tensors="pt")
tokens = student.generate(**prompt, max_new_tokens=30, do_sample=False)
print(teacher.tokenizer.decode(tokens[0]))
