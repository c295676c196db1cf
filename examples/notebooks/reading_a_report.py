# %% [markdown]
# # Reading a report
#
# A small run, its evaluation, and what each of the numbers says. The page that holds all of them is
# made by `python -m distillation.report RUN`; here they are taken one by one.

# %%
import json
from pathlib import Path

from cleangpt.data import DistillationDataCollator, TextDataset, load_texts, make_dataloader
from cleangpt.teacher import load_teacher
from config_distillation import GPTConfig
from distillation import DistillationTrainer
from distillation.evaluation import EvaluationSettings, evaluate
from distillation.evaluation.report import write_report
from distillation.evaluation.tables import ShownEvaluation
from distillation.evaluation.training_record import add_local_errors, local_errors
from model import build_student
from stitching_layers import load_stitches

DOCUMENTS = 8
RUN = Path("runs/notebooks/report")

teacher = load_teacher("builtin")
texts = load_texts("builtin", max_samples=DOCUMENTS).texts
loader = make_dataloader(
    TextDataset(texts, teacher.tokenizer, block_size=64),
    DistillationDataCollator(teacher.tokenizer, block_size=64),
    batch_size=16,
)
student = build_student(
    GPTConfig(model_type="SASP", vocab_size=2048, n_layer=3, n_embd=64, n_head=4, block_size=64)
)
results = DistillationTrainer(
    teacher.model,
    student,
    teacher.tokenizer,
    loader,
    output_dir=RUN,
    overwrite=True,
    log_interval=5,
    distill_loss_type="nmse",
    stitch_start="least_squares",
    block_inputs="teacher",
    init_from_teacher="pca",
).train(epochs_per_block=1, lr_per_block=2e-3)

# %% [markdown]
# ## What the training says
#
# `first`, `best` and `last` are losses, in the units of the loss. `relative error` is the same for
# every loss: the squared error as a share of the teacher's variation about its mean. The verdict is
# that number in words.

# %%
results

# %% [markdown]
# The blocks learnt on the teacher's own states (`block_inputs="teacher"`), so that none had met the
# errors of those before it. `chained_error` is measured afterwards, with all blocks in a row. It is
# what the student has to live with; where it is far above `relative_error`, errors add up along the
# chain.

# %%
for row in results["blocks"]:
    print(
        f"block {row['block']}: {row['relative_error']:.3f} as it learnt,"
        f" {row['chained_error']:.3f} in the chain"
    )

# %% [markdown]
# ## What the run wrote down
#
# `metrics.jsonl` has one line per event. The page *What is logged* of the documentation explains
# each key.

# %%
events = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
for kind in dict.fromkeys(event["event"] for event in events):
    print(next(event for event in events if event["event"] == kind))

# %% [markdown]
# `audit.json` says what the teacher's states look like, before anything was trained. `rank_floor`
# is the share of variation that no linear stitch from the student's width can reach, at each level:
# a loss cannot fall below it, however long the training.

# %%
audit = json.loads((RUN / "audit.json").read_text())
print(sorted(audit))
for level in audit["levels"]:
    print({name: level[name] for name in list(level)[:6]})

# %% [markdown]
# ## What the evaluation says
#
# On text that neither model has seen. Perplexity says how well a model predicts the text, KL and
# agreement how like its teacher it is: a student can be near in one and far in the other.

# %%
report = evaluate(
    student,
    teacher.model,
    teacher.tokenizer,
    load_texts("builtin", split="test", max_samples=3).texts,
    stitches=load_stitches(RUN),
    settings=EvaluationSettings(
        max_tokens=6000, speed_seconds=1.0, num_prompts=1, max_new_tokens=20
    ),
)
add_local_errors(report, local_errors(RUN))
report

# %% [markdown]
# In the second table `local error` is what the run recorded and `chained error` what the finished
# student does on this text. A low cosine with a low error would mean that a mean is learnt and no
# more.
#
# The same text continued by both, greedily and with the same seed. A perplexity can improve while
# this gets worse, so read it.

# %%
for item in report["generations"]:
    print(item["mode"], "|", item["prompt"][-60:])
    for name, text in item["continuations"].items():
        print("  ", name, "|", text)

# %% [markdown]
# ## Files
#
# `results.json` is the dictionary above, with numbers that are not finite as null and named under
# `non_finite`. Read back, it can be shown again.

# %%
written = write_report(report, RUN / "evaluation", run_dir=RUN)
print(sorted(written))
ShownEvaluation(json.loads(written["results.json"].read_text()))
