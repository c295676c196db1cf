"""What the evaluation's tests share: prose, models saved to disk, and a result."""

import functools
from pathlib import Path
from typing import Any

VOCAB = 258
END = 256
PROSE = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n" * 3,
    "A student learns block by block what the teacher knows.\nIt has fewer parameters.\n" * 3,
    "Perplexity is the exponential of the mean loss; lower is better, and one is perfect. " * 3,
]


@functools.cache
def _device_tensor() -> Any:
    import torch

    class DeviceTensor(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, *rest: Any) -> Any:
            result = super().__torch_function__(func, *rest)
            if func is torch.Tensor.cpu:
                return result.as_subclass(torch.Tensor)
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                raise TypeError("Cannot convert a tensor to float64: the device does not have it.")
            return result

    return DeviceTensor


def without_float64(tensor: Any) -> Any:
    """The tensor as if on a device that has no float64, such as Apple's, until ``cpu()``."""
    return tensor.as_subclass(_device_tensor())


def byte_tokenizer() -> Any:
    from tests.byte_tokenizer import make_tokenizer

    return make_tokenizer(eos_token="<end>")


def teacher(**changes: Any) -> Any:
    from tests.builders import tiny_teacher

    defaults = {"vocab_size": VOCAB, "bos_token_id": END, "eos_token_id": END}
    return tiny_teacher("gpt2", **{**defaults, **changes})


def student(kind: str = "Vanilla", **changes: Any) -> Any:
    from tests.builders import tiny_student

    return tiny_student(kind, **{"vocab_size": VOCAB, **changes}).eval()


def save_teacher(folder: Path) -> Path:
    teacher().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_run(folder: Path, kind: str = "Vanilla", **changes: Any) -> Path:
    """A run directory as training leaves it: checkpoint, final/ and stitches."""
    from distillation.utils.checkpoint import save_checkpoint
    from stitching_layers import StitchingLayers, stitches_to_bytes

    model = student(kind, **changes)
    folder.mkdir(parents=True)
    save_checkpoint(model, folder / "student_model_final_distilled.pt")
    model.save_pretrained(folder / "final")
    byte_tokenizer().save_pretrained(folder / "final")
    stitches = StitchingLayers((0, 2), student_dim=16, teacher_dim=32)
    (folder / "stitching_layers.safetensors").write_bytes(stitches_to_bytes(stitches))
    return folder


def fast_settings(**changes: Any) -> Any:
    """Settings without the speed measurement, which takes time and gives no fixed numbers."""
    from distillation.evaluation.results import EvaluationSettings

    return EvaluationSettings(**{"speed_seconds": 0.0, **changes})


def evaluated(**changes: Any) -> Any:
    """The result of a tiny student against a tiny teacher."""
    from distillation.evaluation import evaluate

    return evaluate(
        student(), teacher(), byte_tokenizer(), PROSE, settings=fast_settings(**changes)
    )
