"""The naive loop: block-wise distillation as one writes it straight from the tutorial.

What is naive about it, and the only things that are:

* for every block, epoch and batch the whole teacher and the whole student run, from the embeddings
  to the logits, with ``output_hidden_states=True``; of all that, one hidden state of each is used;
* nothing is remembered from one epoch or block to the next;
* the head phase, too, runs both models whole, and its loss is dense over [batch, seq, vocab];
* everything is float32.

What is *not* held against it: the teacher runs under ``no_grad``, nobody keeps key-value caches,
frozen parameters have ``requires_grad=False`` (so no gradient is computed for them, and backward
stops at the block in training), optimizer states exist for the trained tensors only, nothing is
copied or synchronised that a careful researcher would not, and the kernels are PyTorch's own, as in
the library. Targets are the teacher's raw block outputs: the last entry of ``transformers``'
``hidden_states`` is taken after the final norm, so the last state is read before that norm.

Start, data order, learning rates, weight decay, clipping and seeds are those of
``distillation.trainers``, so its losses are the library's, up to rounding. It never calls the
library's stages, stores, losses or training loop.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cleangpt.blocks import BlockStack
from cleangpt.runtime.device import seed_generators
from cleangpt.schedules import learning_rate_factor
from distillation.config import DistillationConfig, StageSettings
from distillation.head_init import untie_lm_head
from distillation.stages import embedding_modules
from distillation.trainers.stage_loop import derived_seed
from stitching_layers import StitchingLayer

Loader = Any
"""A sized iterable of ``{"input_ids", "attention_mask"}``, each of shape [batch, seq]."""


@dataclass
class Epoch:
    """What one pass over the data gave.

    Args:
        loss: Mean over valid positions.
        step_seconds: Wall time of each step, loading its batch included.
        losses: The loss of each step.
    """

    loss: float
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class FullForward:
    """A model called as the tutorial calls it: all hidden states and the logits, every time."""

    def __init__(self, model: nn.Module) -> None:
        stack = BlockStack(model)
        self.model = model
        self.num_blocks = stack.num_blocks
        self.final_norm = stack.final_norm

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the logits, and the raw output of every block."""
        last: list[Tensor] = []
        hook = self.final_norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
        try:
            output = self.model(**batch, output_hidden_states=True, use_cache=False)
        finally:
            hook.remove()
        return output.logits, [*output.hidden_states[1 : self.num_blocks], last[0]]


class NaiveLoop:
    """The epochs of one stage.

    Args:
        name: The library's name of the stage; it seeds dropout.
        teacher: The model that is imitated.
        student: The model that learns, in place.
        loader: The data.
        modules: What is trained, by name.
        loss: ``batch -> mean loss over valid positions``.
        settings: Epochs, learning rate, weight decay and clipping.
        config: The schedule and the seed.
    """

    def __init__(
        self,
        name: str,
        teacher: nn.Module,
        student: nn.Module,
        loader: Loader,
        modules: dict[str, nn.Module],
        loss: Callable[[Mapping[str, Tensor]], Tensor],
        settings: StageSettings,
        config: DistillationConfig,
    ) -> None:
        self.name, self.loader, self.loss = name, loader, loss
        self.settings, self.config = settings, config
        self.device = next(iter(student.parameters())).device
        teacher.eval().requires_grad_(False)
        student.eval().requires_grad_(False)
        for module in modules.values():
            module.train().requires_grad_(True)
        self.parameters, groups = trained_parameters(modules, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
        self.total_steps = len(loader) * settings.epochs
        self.epochs_done = self.steps_done = 0

    def run(self) -> list[Epoch]:
        """All epochs."""
        return [self.epoch() for _ in range(self.settings.epochs)]

    def epoch(self, max_steps: int | None = None) -> Epoch:
        """The next pass over the data, or its first ``max_steps`` steps."""
        seed_generators(derived_seed(self.config.seed, f"epoch {self.epochs_done}"), self.device)
        done, positions = Epoch(0.0), 0
        started_at = time.perf_counter()
        for batch in on_device(self.loader, self.device):
            loss = self._step(batch)
            count = int(batch["attention_mask"].sum())
            done.loss += loss * count
            positions += count
            done.losses.append(loss)
            now = time.perf_counter()
            done.step_seconds.append(now - started_at)
            started_at = now
            if len(done.losses) == max_steps:
                break
        self.epochs_done += 1
        done.loss /= max(1, positions)
        return done

    def _step(self, batch: Mapping[str, Tensor]) -> float:
        seed_generators(derived_seed(self.config.seed, self.name, self.steps_done), self.device)
        factor = learning_rate_factor(
            self.steps_done,
            self.total_steps,
            schedule=self.config.lr_schedule,
            warmup_ratio=self.config.warmup_ratio,
            min_lr_ratio=self.config.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor
        self.steps_done += 1
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        return float(loss.detach())


def naive_block(
    teacher: nn.Module,
    student: nn.Module,
    stitch: StitchingLayer,
    block: int,
    loader: Loader,
    settings: StageSettings,
    config: DistillationConfig | None = None,
    *,
    teacher_block: int | None = None,
) -> NaiveLoop:
    """The loop of one block; block 0 learns together with the embeddings.

    Without ``teacher_block`` student block i learns teacher block i, as for models of equal depth.
    """
    target = block if teacher_block is None else teacher_block
    whole_teacher, whole_student = FullForward(teacher), FullForward(student)

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            _, targets = whole_teacher(batch)
        _, states = whole_student(batch)
        mask = batch["attention_mask"].bool()
        return F.mse_loss(valid(stitch(states[block]), mask), valid(targets[target], mask))

    stack = BlockStack(student)
    modules: dict[str, nn.Module] = {f"blocks.{block}": stack.block(block), "stitch": stitch}
    if block == 0:
        modules.update(embedding_modules(stack))
    return NaiveLoop(
        f"block-{block:02d}",
        teacher,
        student,
        loader,
        modules,
        loss,
        settings,
        config or DistillationConfig(),
    )


def naive_head(
    teacher: nn.Module,
    student: nn.Module,
    loader: Loader,
    settings: StageSettings,
    config: DistillationConfig | None = None,
) -> NaiveLoop:
    """The loop of the head phase: final norm and head, which is untied from the embeddings."""
    config = config or DistillationConfig()
    stack = BlockStack(student)
    untie_lm_head(stack)
    whole_teacher, whole_student = FullForward(teacher), FullForward(student)

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            targets, _ = whole_teacher(batch)
        logits, _ = whole_student(batch)
        mask = batch["attention_mask"].bool()
        return dense_kl(valid(logits, mask), valid(targets, mask), config.logit_loss_temperature)

    modules = {"final_norm": stack.final_norm, "lm_head": stack.lm_head}
    return NaiveLoop("lm-head", teacher, student, loader, modules, loss, settings, config)


def naive_end_to_end(
    teacher: nn.Module,
    student: nn.Module,
    loader: Loader,
    settings: StageSettings,
    config: DistillationConfig | None = None,
) -> NaiveLoop:
    """Logit distillation of the whole student at once, as a ``compute_loss`` of HF's Trainer.

    Per step: teacher forward, student forward and backward through everything, dense loss.
    """
    config = config or DistillationConfig()

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            targets = teacher(**batch, use_cache=False).logits
        logits = student(**batch, use_cache=False).logits
        mask = batch["attention_mask"].bool()
        return dense_kl(valid(logits, mask), valid(targets, mask), config.logit_loss_temperature)

    modules = {"student": student}
    return NaiveLoop("end-to-end", teacher, student, loader, modules, loss, settings, config)


def dense_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) in nats per position times temperature^2, both [positions, vocab]."""
    log_p_student = F.log_softmax(student / temperature, dim=-1)
    p_teacher = F.softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_p_student, p_teacher, reduction="batchmean") * temperature**2


def valid(values: Tensor, mask: Tensor) -> Tensor:
    """Valid positions of [batch, seq, dim]: a view where nothing is padded."""
    return values.flatten(0, 1) if bool(mask.all()) else values[mask]


def on_device(loader: Iterable[Any], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The loader's batches on the training device."""
    for batch in loader:
        yield {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def trained_parameters(
    modules: dict[str, nn.Module], weight_decay: float
) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    """The trained tensors, and the optimizer's groups: only matrices decay, stitches never."""
    seen: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            seen.setdefault(id(parameter), (f"{prefix}.{name}", parameter))
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in seen.values():
        plain = parameter.ndim < 2 or name.startswith("stitch.")
        groups[int(plain)]["params"].append(parameter)
    return [parameter for _, parameter in seen.values()], [g for g in groups if g["params"]]
