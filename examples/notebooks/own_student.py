# %% [markdown]
# # Your own student
#
# A student is any causal LM of transformers, or a class of your own. Two of them learn from the
# same teacher here, each for a few seconds: enough to see that they train, not how good they can
# become.

# %%
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from cleangpt.data import DistillationDataCollator, TextDataset, load_texts, make_dataloader
from cleangpt.teacher import load_teacher
from config_distillation import GPTConfig
from distillation import DistillationTrainer
from model import STUDENTS, get_model_class
from model.configuration import VanillaConfig
from model.layers import MLP
from model.model_vanilla_distillation import (
    VanillaBlock,
    VanillaTransformerModelDistillation,
)

DOCUMENTS = 6
FOLDER = "runs/notebooks/own_student"

teacher = load_teacher("builtin")
VOCAB = teacher.model.config.vocab_size
texts = load_texts("builtin", max_samples=DOCUMENTS).texts
loader = make_dataloader(
    TextDataset(texts, teacher.tokenizer, block_size=64),
    DistillationDataCollator(teacher.tokenizer, block_size=64),
    batch_size=16,
)


def distil(student: nn.Module, name: str) -> DistillationTrainer:
    """Train a student for four epochs per block, and one of its head."""
    trainer = DistillationTrainer(
        teacher.model,
        student,
        teacher.tokenizer,
        loader,
        output_dir=f"{FOLDER}/{name}",
        overwrite=True,
        distill_loss_type="nmse",
        stitch_start="least_squares",
    )
    print(trainer.train(epochs_per_block=4, lr_per_block=1e-3))
    return trainer


# %% [markdown]
# ## A causal LM of transformers
#
# Blocks, final norm and head are found by the structure of the model, not by its names: the blocks
# are the outermost list of as many modules as the configuration has layers. On the command line it
# is `--student_model_type hf --student_config FOLDER`.

# %%
torch.manual_seed(0)
llama = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=teacher.tokenizer.eos_token_id,
        pad_token_id=None,
    )
)
distil(llama, "llama")

# %% [markdown]
# The student has three blocks and the teacher six: block m learns from teacher block 1, 3 and 5,
# the last from the last. `layer_map=` chooses others.
#
# ## A class of your own
#
# A new kind is a class on one of ours with another block. This one has a gated MLP (Shazeer 2020,
# arXiv:2002.05202) in place of the plain one. `generate`, the cache, padding and saving come from
# the base class. `StudentModel` in `model/student.py` is the base of all, if attention should go as
# well.


# %%
class GatedMLP(MLP):
    """``down(silu(gate x) * up x)``."""

    def __init__(self, config: VanillaConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.n_embd, self.up.out_features, bias=config.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Map each position by itself."""
        mixed: Tensor = self.down(F.silu(self.gate(states)) * self.up(states))
        return mixed


class GatedBlock(VanillaBlock):
    """A Vanilla block with a gated MLP."""

    def __init__(self, config: VanillaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = GatedMLP(config)


class GatedStudent(VanillaTransformerModelDistillation):
    """A small GPT with gated MLPs."""

    block_class = GatedBlock


# %% [markdown]
# One line enters it in the registry, by which `get_model_class` finds it, here as in the command.

# %%
STUDENTS["Gated"] = GatedStudent
config = GPTConfig(
    model_type="Gated", vocab_size=VOCAB, n_layer=3, n_embd=64, n_head=4, block_size=64, dropout=0.0
)
gated = get_model_class("gated")(config)
distil(gated, "gated")

# %% [markdown]
# ## It generates, and its folder loads

# %%
prompt = teacher.tokenizer("The function", return_tensors="pt")
print(teacher.tokenizer.decode(gated.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
again = GatedStudent.from_pretrained(f"{FOLDER}/gated/final")
ids = prompt["input_ids"]
print("the saved one gives the same logits:", torch.equal(again(ids).logits, gated(ids).logits))
