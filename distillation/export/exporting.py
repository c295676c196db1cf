"""Load a student, write it in another form, read that back, and only then let the folder appear."""

import importlib.util
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from cleangpt import __version__
from cleangpt.disk_errors import disk_errors_explained
from cleangpt.errors import EnvironmentProblem, InputError, UsageError
from cleangpt.integrity import CARD_NAME
from cleangpt.manifest import read_manifest
from cleangpt.run_directory import RunDirectory
from cleangpt.teacher import load_teacher, quiet_libraries
from distillation.evaluation.loading import LoadedModel, load_model
from distillation.export import gguf_file, onnx_graph
from distillation.export.card import exported_card
from distillation.export.comparing import LIMIT, Difference, compare
from distillation.export.gpt2 import to_gpt2
from distillation.export.target import RECORD_NAME, check_target
from model import StudentModel

_NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
_SAMPLE = "def f(x):\n    return [x + 1, 'two', 3.0]  # it's so -- and on\n"


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Args:
        folder: Where.
        difference: Largest difference of a logit between the student and what was read back.
        largest_logit: For comparison.
        limit: The difference allowed, as a share of the largest logit.
        notes: What the user should know.
    """

    folder: Path
    difference: float
    largest_logit: float
    limit: float
    notes: tuple[str, ...] = ()


def export(
    source: str,
    form: str,
    output: Path,
    *,
    overwrite: bool = False,
    gguf_type: str = "F32",
    trust_remote_code: bool = False,
) -> Exported:
    """Export a student.

    Args:
        source: A run directory, its ``final/`` or its ``.pt`` file.
        form: "hf", "gpt2", "gguf" or "onnx".
        output: The folder to make.
        overwrite: Whether an earlier export there may be replaced.
        gguf_type: How a GGUF file stores matrices, "F32" or "F16".
        trust_remote_code: Whether code inside a model folder may run.

    Raises:
        UsageError: If the student has no equal in that form, or the place is taken.
        CheckpointError: If files are damaged, or what was written does not compute the same.
        EnvironmentProblem: If a package is missing, or the place cannot be written.
    """
    _check_packages(form)
    check_target(output, overwrite=overwrite)
    loaded = load_model(source, trust_remote_code=trust_remote_code, flag="the first argument")
    tokenizer = _tokenizer_of(loaded)
    writer = _Writer(loaded, tokenizer, gguf_type)
    write = {"hf": writer.hf, "gpt2": writer.gpt2, "gguf": writer.gguf, "onnx": writer.onnx}[form]
    done: list[Difference] = []

    def fill(folder: Path) -> None:
        done.append(write(folder))
        (folder / RECORD_NAME).write_text(_record(loaded, form, done[0]), encoding="utf-8")
        card = exported_card(_card_beside(loaded), loaded.name, form)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")

    output = output.absolute()
    with disk_errors_explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    check_target(output, overwrite=overwrite)
    with quiet_libraries():
        folder = RunDirectory(output.parent).write_folder(output.name, fill)
    difference = done[0]
    return Exported(
        folder, difference.largest, difference.largest_logit, LIMIT, (*loaded.notes, *writer.notes)
    )


def _check_packages(form: str) -> None:
    missing = [name for name in _NEEDED.get(form, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"--format {form} needs {', '.join(missing)}, which is not installed.",
            f"Install the extra: pip install 'cleangpt-distillation[{form}]'.",
        )


def _home_of(loaded: LoadedModel) -> Path:
    """The HuggingFace folder that the student is, or that lies beside it."""
    source = Path(loaded.source)
    return source if (source / "config.json").is_file() else loaded.run_dir / "final"


def _tokenizer_of(loaded: LoadedModel) -> Any:
    """The tokenizer beside a student; None without one."""
    if loaded.vocabulary is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_home_of(loaded), local_files_only=True)


def _card_beside(loaded: LoadedModel) -> str | None:
    path = _home_of(loaded) / CARD_NAME
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _record(loaded: LoadedModel, form: str, difference: Difference) -> str:
    manifest = read_manifest(loaded.run_dir) or {}
    record = {
        "format": form,
        "run_id": manifest.get("run_id"),
        "student": loaded.name,
        "largest_difference": difference.largest,
        "largest_logit": difference.largest_logit,
        "limit": LIMIT,
        "library_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }
    return json.dumps(record, indent=2) + "\n"


class _Writer:
    """Each form as a function that fills a folder and says how near it came.

    Args:
        loaded: The student.
        tokenizer: Its tokenizer, or None.
        gguf_type: How a GGUF file stores matrices.
    """

    def __init__(self, loaded: LoadedModel, tokenizer: Any, gguf_type: str) -> None:
        self.student: Any = loaded.model
        self.tokenizer = tokenizer
        self.gguf_type = gguf_type
        self.notes: list[str] = []
        if tokenizer is None:
            self.notes.append("No tokenizer lies beside the student: the export has none either.")

    def hf(self, folder: Path) -> Difference:
        """The student with its own code."""
        self._save(self.student, folder)
        return self._compared(load_model(str(folder), trust_remote_code=False).model)

    def gpt2(self, folder: Path) -> Difference:
        """Transformers' own GPT-2."""
        self._save(to_gpt2(self.student), folder)
        again = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
        return self._compared(again.eval())

    def gguf(self, folder: Path) -> Difference:
        """One file for llama.cpp, read back by transformers."""
        if self.tokenizer is None:
            raise UsageError(
                "A GGUF file holds its tokenizer, and none lies beside the student.",
                "Use --format gpt2, or save the tokenizer into the student's folder.",
            )
        gpt2 = to_gpt2(self.student)
        file = gguf_file.write_gguf(
            gpt2, self.tokenizer, folder / gguf_file.FILE_NAME, self.gguf_type
        )
        again = load_teacher(str(file))
        self._check_tokenizer(again.tokenizer)
        if self.gguf_type != "F32":
            self.notes.append("Compared with the student's matrices rounded to F16.")
        self.student = gguf_file.as_stored(gpt2, self.gguf_type)
        return self._compared(again.model)

    def onnx(self, folder: Path) -> Difference:
        """One graph, run in onnxruntime."""
        if not isinstance(self.student, StudentModel):
            raise UsageError(
                f"{type(self.student).__name__} is not a student of ours.",
                "Export a class of transformers with optimum-cli export onnx.",
            )
        onnx_graph.write_onnx(self.student, folder / onnx_graph.FILE_NAME)
        self.student.config.save_pretrained(folder)
        self.student.generation_config.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        return onnx_graph.compare_in_runtime(self.student, folder / onnx_graph.FILE_NAME)

    def _save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def _compared(self, again: Any) -> Difference:
        rows = min(model.get_input_embeddings().weight.shape[0] for model in (self.student, again))
        context = self.student.config.max_position_embeddings
        return compare(partial(_logits, self.student), partial(_logits, again), rows, context)

    def _check_tokenizer(self, again: Any) -> None:
        """Refuse a tokenizer that comes back changed. SmolLM's digits llama.cpp alone splits."""
        sample = _SAMPLE
        if gguf_file.pre_tokenizer_of(self.tokenizer) == "smollm":
            sample = "".join(c for c in sample if not c.isdigit())
        if again(sample).input_ids != self.tokenizer(sample).input_ids:
            raise InputError(
                "The tokenizer that was read back from the GGUF file splits text in another way.",
                "Use --format gpt2, and convert it with llama.cpp's own tool.",
            )


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(tokens).logits
    return logits
