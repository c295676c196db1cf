"""The students' equations written as plainly as possible: float64, loops, explicit matrices.

Nothing here is fast or shared with ``model``: it is what ``model`` is compared with. One sequence,
no padding, no cache. The equations are those in the three model files' docstrings.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from config_distillation import GPTConfig
from model import STUDENTS, StudentModel, build_student

KINDS = tuple(STUDENTS)
VOCAB = 41


def student_config(kind: str, **fields: Any) -> GPTConfig:
    """Return a tiny configuration of that kind, without dropout."""
    defaults: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": VOCAB,
        "n_layer": 3,
        "n_embd": 24,
        "n_head": 3,
        "block_size": 24,
        "dropout": 0.0,
    }
    return GPTConfig(**{**defaults, **fields})


def noisy_student(kind: str, seed: int = 0, **fields: Any) -> StudentModel:
    """Return a student in eval mode whose parameters all differ from their initial values."""
    torch.manual_seed(seed)
    student = build_student(student_config(kind, **fields))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return student.eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Return random token ids."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def reference_logits(student: StudentModel, token_ids: list[int]) -> tuple[list[Tensor], Tensor]:
    """Return the hidden states (embeddings, then each block's raw output) and the logits."""
    config = student.config
    parameters = {name: p.detach().double() for name, p in student.named_parameters()}
    x = torch.stack(
        [parameters["wte.weight"][i] + parameters["wpe.weight"][t] for t, i in enumerate(token_ids)]
    )
    step = EQUATIONS[config.model_type]
    state = (x, torch.zeros_like(x)) if config.model_type == "Factored" else (x,)
    hidden = [x]
    for index in range(config.n_layer):
        prefix = f"blocks.{index}."
        block = {k[len(prefix) :]: v for k, v in parameters.items() if k.startswith(prefix)}
        state = step(block, state, config)
        hidden.append(sum(state[1:], state[0]))
    if config.head_rank is None:
        head = parameters.get("lm_head.weight", parameters["wte.weight"])
    else:
        head = parameters["lm_head.up.weight"] @ parameters["lm_head.down.weight"]
    bias = parameters.get("lm_head.bias", parameters.get("lm_head.up.bias", 0.0))
    return hidden, final_features(parameters, hidden[-1]) @ head.T + bias


def final_features(parameters: dict[str, Tensor], hidden: Tensor) -> Tensor:
    weight = parameters["final_norm.weight"]
    if weight.ndim == 1:
        return layer_norm(parameters, "final_norm", hidden)
    mapped = torch.stack([weight @ torch.cat([h, torch.ones_like(h[:1])]) for h in hidden])
    return mapped / (mapped.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _vanilla(p: dict[str, Tensor], state: tuple[Tensor, ...], config: Any) -> tuple[Tensor, ...]:
    (x,) = state
    normed = layer_norm(p, "norm1", x)
    value = channel_map(p, "value", normed, config)
    a = x + channel_map(p, "proj", attention(p, normed, value, config), config)
    return (a + mlp(p, layer_norm(p, "norm2", a), gelu),)


def _factored(p: dict[str, Tensor], state: tuple[Tensor, ...], config: Any) -> tuple[Tensor, ...]:
    xt, xe = state
    value = channel_map(p, "value", xt, config)
    y = attention(p, layer_norm(p, "norm1", xt + xe), value, config)
    gain = p.get("gain.weight", torch.ones(config.n_head, dtype=torch.float64))
    y = y * gain.repeat_interleave(config.head_dim)
    xt = xt + channel_map(p, "proj", y, config)
    return xt, xe + mlp(p, layer_norm(p, "norm2", xt + xe), gelu)


def _sasp(p: dict[str, Tensor], state: tuple[Tensor, ...], config: Any) -> tuple[Tensor, ...]:
    (x,) = state
    u = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"]
    v = channel_map(p, "value", u, config)
    length = len(x)
    centre = torch.tensor(
        [[1 / (t + 1) if j <= t else 0.0 for j in range(length)] for t in range(length)],
        dtype=torch.float64,
    )
    one = torch.ones(config.n_head, dtype=torch.float64)
    heads = []
    for h, weights in enumerate(attention_weights(p, u, config)):
        alpha, beta, gamma = (
            p.get(f"{name}.weight", one)[h] for name in ("alpha", "beta", "gamma")
        )
        shaped = alpha * torch.eye(length, dtype=torch.float64) + beta * weights - gamma * centre
        heads.append(shaped @ v[:, h * config.head_dim : (h + 1) * config.head_dim])
    y = channel_map(p, "proj", torch.cat(heads, dim=-1), config)
    return (y + p["beta_ff"] * mlp(p, u, lambda z: z.clamp(min=0)),)


EQUATIONS = {"Vanilla": _vanilla, "Factored": _factored, "SASP": _sasp}


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def layer_norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed * p[f"{name}.weight"] + p.get(f"{name}.bias", 0.0)


def channel_map(p: dict[str, Tensor], name: str, x: Tensor, config: Any) -> Tensor:
    if f"{name}.weight" not in p:
        return x
    if p[f"{name}.weight"].shape == (config.n_head, config.n_head):
        lifted = torch.kron(p[f"{name}.weight"], torch.eye(config.head_dim, dtype=torch.float64))
        return x @ lifted.T
    return linear(p, name, x)


def mlp(p: dict[str, Tensor], u: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return linear(p, "mlp.down", act(linear(p, "mlp.up", u)))


def gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def attention_weights(p: dict[str, Tensor], normed: Tensor, config: Any) -> list[Tensor]:
    """Return one T x T matrix per head, entry by entry."""
    query, key = linear(p, "attention.query", normed), linear(p, "attention.key", normed)
    length, width = len(normed), config.head_dim
    matrices = []
    for h in range(config.n_head):
        part = slice(h * width, (h + 1) * width)
        matrix = torch.zeros(length, length, dtype=torch.float64)
        for t in range(length):
            scores = [
                math.exp(float(query[t, part] @ key[j, part]) / math.sqrt(width))
                for j in range(t + 1)
            ]
            matrix[t, : t + 1] = torch.tensor(scores, dtype=torch.float64) / sum(scores)
        matrices.append(matrix)
    return matrices


def attention(p: dict[str, Tensor], normed: Tensor, value: Tensor, config: Any) -> Tensor:
    width = config.head_dim
    return torch.cat(
        [
            weights @ value[:, h * width : (h + 1) * width]
            for h, weights in enumerate(attention_weights(p, normed, config))
        ],
        dim=-1,
    )
