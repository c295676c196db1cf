"""Teachers that are stored quantised: turned back into plain numbers when they are loaded.

Blocks are run alone, heads are solved for and weights are fingerprinted, all of which needs
ordinary tensors. A GGUF file's numbers, and those of formats that transformers unpacks itself, are
plain at once; the others are unpacked here, or refused in words. Used by ``teacher``.
"""

from typing import Any

import torch
import transformers
from torch import nn

from cleangpt.errors import EnvironmentProblem, InputError

PLAIN = "as a folder in bf16 or fp32, or as a GGUF file, whose numbers are unpacked on loading"


def loading_options(gguf_file: str | None) -> dict[str, Any]:
    """Keywords of ``from_pretrained`` that leave nothing of a GGUF file packed.

    By default a GPU's packed kernels would be used, and a model that was quantised counts as one
    that cannot be saved.
    """
    packs = getattr(transformers, "GgufConfig", None)  # since transformers 5.6
    if gguf_file is None or packs is None:
        return {}
    return {"quantization_config": packs(dequantize=True)}


def quantisation_of(config: Any) -> str | None:
    """The name of the format in which the weights are stored; None if they are plain."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    known = settings if isinstance(settings, dict) else settings.to_dict()
    return str(known.get("quant_method", "an unknown format")).rpartition(".")[2].lower()


def not_readable(label: str, kind: str, error: BaseException, flag: str) -> EnvironmentProblem:
    """The error for quantised weights whose reader is not installed."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return EnvironmentProblem(
        f"teacher {label} is stored quantised ({kind}), and what reads that is missing:"
        f" {lines[0].strip()}",
        f"Install it, or give {flag} the model {PLAIN}.",
    )


@torch.no_grad()
def unpack(model: Any, dtype: torch.dtype, label: str, flag: str) -> Any:
    """Return the model with plain numbers of ``dtype`` in place of quantised ones.

    Raises:
        InputError: If the format can only be computed with, and not undone.
    """
    if not getattr(model, "is_quantized", False):
        return model
    kind = quantisation_of(model.config)
    try:
        return model.dequantize(dtype=dtype)
    except NotImplementedError:
        pass
    packed = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if type(parameter) is not nn.Parameter
    ]
    if not packed:
        raise InputError(
            f"teacher {label} is stored quantised ({kind}), and transformers cannot turn that back"
            " into plain numbers.",
            f"Give {flag} the model {PLAIN}.",
        )
    plain: dict[int, nn.Parameter] = {}  # a shared one stays shared
    for module, name, parameter in packed:
        if id(parameter) not in plain:
            plain[id(parameter)] = nn.Parameter(parameter.dequantize().to(dtype))
        module.register_parameter(name, plain[id(parameter)])
    model.hf_quantizer.remove_quantization_config(model)
    return model
