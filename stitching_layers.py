"""Stitching layers: trainable linear maps from a student's hidden states to the teacher's width.

A stitch is only used while training and measuring. It is kept beside the student and never inside
it. Model stitching goes back to Lenc & Vedaldi (2015, arXiv:1411.5908); as a regressor for
distillation to FitNets (Romero et al. 2015, arXiv:1412.6550, eq. 3).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn


class StitchingLayer(nn.Module):
    """A linear projection from student to teacher hidden states.

    Starts as the identity when the widths are equal, else Xavier-uniform (Glorot & Bengio 2010)
    with a zero bias.

    Args:
        student_dim: Width of the student's hidden states.
        teacher_dim: Width of the teacher's hidden states.
        bias: Whether to add a trainable bias. It absorbs the constant part of the teacher's states,
            which then costs the student no capacity.
    """

    def __init__(self, student_dim: int, teacher_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.projection = nn.Linear(student_dim, teacher_dim, bias=bias)
        if student_dim == teacher_dim:
            nn.init.eye_(self.projection.weight)
        else:
            nn.init.xavier_uniform_(self.projection.weight)
        if bias:
            nn.init.zeros_(self.projection.bias)

    def forward(
        self, student_hidden_states: Float[Tensor, "*positions d_student"]
    ) -> Float[Tensor, "*positions d_teacher"]:
        """Return the projected hidden states."""
        projected: Tensor = self.projection(student_hidden_states)
        return projected


class StitchingLayers(nn.ModuleList):
    """One stitch per student block, and the teacher block each one leads to.

    Args:
        layer_map: Entry m is the teacher block that student block m learns from.
        student_dim: Width of the student's hidden states.
        teacher_dim: Width of the teacher's hidden states.
        bias: Whether the stitches have a bias.
    """

    def __init__(
        self, layer_map: Sequence[int], student_dim: int, teacher_dim: int, bias: bool = True
    ) -> None:
        super().__init__([StitchingLayer(student_dim, teacher_dim, bias) for _ in layer_map])
        self.layer_map = tuple(layer_map)
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.bias = bias


def stitches_to_bytes(stitches: StitchingLayers) -> bytes:
    """Serialise all stitches as one safetensors file, with a checksum in its metadata."""
    # One metadata key: with several, the header's order and so the file's hash change on every run.
    about = {
        "layer_map": list(stitches.layer_map),
        "student_dim": stitches.student_dim,
        "teacher_dim": stitches.teacher_dim,
        "bias": stitches.bias,
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in stitches.state_dict().items()}
    about["sha256"] = _checksum(about, tensors)
    return save(tensors, metadata={"stitching_layers": json.dumps(about)})


def _checksum(about: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of what is said about the stitches and of every number in them."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_stitches(path: str | Path) -> StitchingLayers:
    """Load the stitches of a run.

    Args:
        path: The ``stitching_layers.safetensors`` file, or the run directory that holds it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file does not hold stitching layers, or not those that were written.
    """
    path = Path(path)
    path = path / "stitching_layers.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no stitching layers there.")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "stitching_layers" not in metadata:
            raise ValueError(
                f"{path} is a safetensors file, but it does not hold stitching layers."
            )
        about = json.loads(metadata["stitching_layers"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = about.pop("sha256", None) if isinstance(about, dict) else None
    if expected is None or expected != _checksum(about, tensors):
        raise ValueError(f"{path} is damaged: its checksum differs.")
    stitches = StitchingLayers(
        about["layer_map"], about["student_dim"], about["teacher_dim"], about["bias"]
    )
    stitches.load_state_dict(tensors, strict=True)
    return stitches.requires_grad_(False).eval()
