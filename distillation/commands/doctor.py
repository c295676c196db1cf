"""A table of verdicts on a run that has not begun: machine, teacher, data, student, places, stages.

Takes the flags of the run. Everything is asked of the code that the run itself would use; what that
refuses is a failure here, with the same cause, remedy and exit code. Nothing is left behind.
"""

import argparse
import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cleangpt.cli import only_warnings, setup_logging
from cleangpt.errors import CleanGPTError, UsageError
from cleangpt.safe_text import clean_line
from distillation.commands.data import build_dataloader, find_documents, validation_dataloader
from distillation.commands.distil import build_trainer, plan, read_teacher, registered
from distillation.commands.dry_steps import dry_steps
from distillation.commands.settings import parse_arguments
from distillation.commands.student import build_student

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cleangpt.teacher import Teacher

T = TypeVar("T")
DISTRIBUTION = "cleangpt-distillation"
OK, WARN, FAIL, SKIPPED = "ok", "warn", "FAIL", "-"
PARAMETERS_PER_TOKEN = 100
RISE = 1.1
"""Of a loss within a few steps, from which it is more than the first steps' wandering."""
SAMPLE_CHARACTERS = 500_000
"""Of a longer text that are cut into windows, which takes a core about half a second."""
_LONG_TEXT = 400


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to change; advice alone makes it a warning."""

    found: str
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """One line of the table."""

    subject: str
    state: str
    found: str
    advice: str = ""
    exit_code: int = 0

    def lines(self) -> list[str]:
        """The line, and below it what to change."""
        shown = [f"{self.state:<5} {self.subject:<10} {clean_line(self.found, _LONG_TEXT)}"]
        if self.advice:
            shown.append(f"{'':16} -> {clean_line(self.advice, _LONG_TEXT)}")
        return shown


class Examination:
    """Runs checks and prints their verdicts as they come."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []

    def check(self, subject: str, look: Callable[..., tuple[T, Finding]], *needs: Any) -> T | None:
        """Run one check on what earlier ones returned; without one of those it is skipped.

        Returns:
            What the check hands on; None if it failed.
        """
        if any(need is None for need in needs):
            self._say(Verdict(subject, SKIPPED, "not looked at, because of what failed above"))
            return None
        try:
            result, finding = look(*needs)
        except CleanGPTError as error:
            self._say(Verdict(subject, FAIL, error.cause, error.remedy, error.exit_code))
            return None
        state = WARN if finding.advice else OK
        self._say(Verdict(subject, state, finding.found, finding.advice))
        return result

    def _say(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        print("\n".join(verdict.lines()), flush=True)

    @property
    def exit_code(self) -> int:
        """That of the first failure; 0 without one."""
        return next((v.exit_code for v in self.verdicts if v.state == FAIL), 0)


def main(argv: list[str] | None = None) -> None:
    """Look at everything a run with these flags would use, and print the verdicts.

    Args:
        argv: The flags of the run; None takes the process's own.

    Raises:
        SystemExit: With the exit code of the first failure.
    """
    setup_logging()
    with only_warnings("distillation", "cleangpt"):
        arguments = parse_arguments(argv, "distillation.doctor")
        if arguments.print_config:
            print(arguments.settings_text, end="")
            return
        arguments.plan, arguments.plan_device = False, None  # it looks at the run itself
        examination = examine(arguments)
    states = [verdict.state for verdict in examination.verdicts]
    print(f"{states.count(OK)} ok, {states.count(WARN)} warnings, {states.count(FAIL)} failures")
    if examination.exit_code:
        raise SystemExit(examination.exit_code)


def examine(arguments: argparse.Namespace) -> Examination:
    """Run all checks, in the order in which a run would come to them."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    own = Examination()
    own.check("packages", look_at_packages)
    output = own.check("output", lambda: look_at_output(arguments))
    device = own.check("device", lambda: look_at_device(arguments))
    teacher = own.check("teacher", lambda d: look_at_teacher(arguments, d), device)
    own.check("tokenizer", look_at_tokenizer, teacher)
    source = own.check("text", lambda: look_at_text(arguments))
    student = own.check("student", lambda t: look_at_student(arguments, t), teacher)
    loader = own.check(
        "windows", lambda *known: look_at_windows(arguments, *known), source, teacher, student
    )
    models = (teacher, student, loader, device)
    own.check("cost", lambda *known: look_at_cost(arguments, *known), *models, output)
    own.check("stages", lambda *known: dry_finding(arguments, *known), *models)
    return own


def look_at_packages() -> tuple[bool, Finding]:
    """Python and what pyproject.toml asks for; a checkout that is not installed says nothing."""
    from packaging.requirements import Requirement

    found = f"Python {platform.python_version()}"
    try:
        needs = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return True, Finding(f"{found}; {DISTRIBUTION} is not installed, versions not compared")
    problems = []
    for text in needs:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(version, prereleases=True):
            problems.append(f"{need.name} {version} is not {need.specifier}")
    main_ones = ("torch", "transformers", "datasets")
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in main_ones)
    advice = f"{'; '.join(problems)}: pip install --upgrade {DISTRIBUTION}" if problems else ""
    return True, Finding(f"{found}, {shown}", advice)


def look_at_output(arguments: argparse.Namespace) -> tuple[Path, Finding]:
    """The run's directory: free, held by a run, to be replaced, or with a run to go on with."""
    from cleangpt.run_directory import RunDirectory
    from cleangpt.run_lock import held, holder_of

    path = Path(arguments.output_dir)
    run, holder = RunDirectory(path), holder_of(path)
    earlier, unfinished = earlier_run(path, holder)
    try:
        replaced = run.check_room(arguments.overwrite, arguments.resume)
    except UsageError as error:
        raise UsageError(f"{error.cause} {earlier}".strip(), error.remedy) from error
    if holder is not None:
        raise held(path, holder)
    if arguments.resume:
        run.manifest()  # refuses a damaged one
    advice = "It is unfinished: --resume instead of --overwrite goes on with it."
    found = " ".join(["replaces the run that is there."] * bool(replaced) + [earlier]).strip()
    return path, Finding(f"{path}: {found or 'free'}", advice if replaced and unfinished else "")


def earlier_run(path: Path, holder: str | None) -> tuple[str, bool]:
    """A sentence about the run in a directory, empty without one; whether it could go on."""
    from cleangpt.manifest import read_manifest

    try:
        status = (read_manifest(path) or {}).get("status")
    except CleanGPTError as error:
        return error.cause, False
    if holder is not None:
        return f"Another run holds it now ({holder or 'unknown process'}).", False
    if status is None or status == "done":
        return f"The run there is {status}." if status else "", False
    how = "killed" if status == "running" else status
    return f"The run there is unfinished ({how}).", True


def look_at_device(arguments: argparse.Namespace) -> "tuple[torch.device, Finding]":
    """Device, threads, memory and how products are computed."""
    import psutil

    from cleangpt.runtime.device import default_device, resolve_device
    from cleangpt.runtime.precision import choose_precision
    from cleangpt.runtime.threads import set_threads
    from distillation.cache_plan import shown_bytes

    device = resolve_device(arguments.device) if arguments.device else default_device()
    threads = set_threads(arguments.threads, arguments.num_workers)
    precision = choose_precision(arguments.precision, device, arguments.student_n_embd or 512)
    memory = shown_bytes(psutil.virtual_memory().available)
    found = f"{device}, {threads}, {memory} of memory free, {precision.name} ({precision.reason})"
    return device, Finding(found)


def look_at_teacher(
    arguments: argparse.Namespace, device: "torch.device"
) -> "tuple[Teacher, Finding]":
    """Loads it: its structure is found and its numbers are finite, or that refuses it."""
    from cleangpt.blocks import BlockStack
    from cleangpt.structure import count_parameters
    from cleangpt.teacher_source import check_teacher_name
    from distillation.preflight import check_structure

    name = arguments.teacher_model_name_or_path
    check_teacher_name(name, revision=arguments.teacher_revision)
    teacher = read_teacher(arguments, device, processes=1)
    stack = BlockStack(teacher.model)
    check_structure(stack)
    context = stack.context_length
    found = (
        f"{name}: {type(teacher.model).__name__}, {stack.num_blocks} blocks of width"
        f" {stack.hidden_size}, {count_parameters(teacher.model):,} parameters,"
        f" context {context or 'free'}"
    )
    longer = context is not None and arguments.block_size > context
    return teacher, Finding(found, f"Set --block_size to {context} or less." if longer else "")


def look_at_tokenizer(teacher: "Teacher") -> tuple[bool, Finding]:
    """Its ids fit the teacher, and documents have an end."""
    from cleangpt.vocabulary import token_rows

    tokenizer = teacher.tokenizer
    rows, end, pad = token_rows(tokenizer), tokenizer.eos_token, tokenizer.pad_token
    advice = "" if end else "No end-of-text token: documents will run into each other."
    found = f"{rows:,} tokens, end {end!r}, padding {pad!r}"
    return True, Finding(found, advice)


def look_at_text(arguments: argparse.Namespace) -> tuple[Any, Finding]:
    """The documents, and whether there is held-out text where the run wants some."""
    source = find_documents(arguments)
    texts = getattr(source, "texts", None)
    found = f"{source.name}: {'a stream' if texts is None else f'{len(texts):,} documents'}"
    found = "; ".join([found, *source.notes])
    if not arguments.validation_tokens:
        return source, Finding(found)
    try:
        find_documents(arguments, "validation")
    except CleanGPTError as error:
        return source, Finding(found, f"No held-out text, so the last weights stay: {error.cause}")
    return source, Finding(f"{found}, and a validation split")


def look_at_student(
    arguments: argparse.Namespace, teacher: "Teacher"
) -> "tuple[nn.Module, Finding]":
    """Builds it, for this teacher."""
    from cleangpt.blocks import BlockStack
    from cleangpt.structure import count_parameters
    from distillation.preflight import check_vocabulary, check_widths

    student = build_student(arguments, teacher, registered)
    stack, teacher_stack = BlockStack(student), BlockStack(teacher.model)
    check_vocabulary(teacher_stack, stack, teacher.tokenizer)
    check_widths(teacher_stack, stack, stitched=arguments.use_stitching_layers)
    parameters = count_parameters(student)
    share = parameters / count_parameters(teacher.model)
    found = (
        f"{type(student).__name__}, {stack.num_blocks} blocks of width {stack.hidden_size},"
        f" {parameters:,} parameters: {share:.0%} of the teacher's, before the head is untied"
    )
    advice = "It is no smaller than its teacher: lower --student_n_embd or --student_n_layer."
    return student, Finding(found, advice if share >= 1 else "")


def look_at_windows(
    arguments: argparse.Namespace, source: Any, teacher: "Teacher", student: "nn.Module"
) -> tuple[Any, Finding]:
    """Tokens and batches; few of them teach little."""
    from cleangpt.structure import count_parameters
    from distillation.cache_plan import positions_in

    sample, times = sample_of(source)
    if times == 1:
        loader = build_dataloader(arguments, source, teacher, student)
    else:
        own = argparse.Namespace(**{**vars(arguments), "no_token_cache": True})
        loader = repeated(build_dataloader(own, sample, teacher, student), times, arguments.seed)
    positions = positions_in(loader)
    batch = next(iter(loader))
    valid = float(batch["attention_mask"].float().mean())
    size = "" if positions is None else f"{positions:,} positions in {len(loader):,} batches, "
    about = "" if times == 1 else f"by the first {SAMPLE_CHARACTERS:,} characters about "
    finding = f"{about}{size}{1 - valid:.0%} padding in the first"
    few = positions is not None and positions * PARAMETERS_PER_TOKEN < count_parameters(student)
    advice = f"Fewer than one token for {PARAMETERS_PER_TOKEN} parameters: give it more text."
    return loader, Finding(finding, advice if few else "")


def sample_of(source: Any) -> tuple[Any, float]:
    """The first documents of a long text, and how many times as long all of it is."""
    texts = getattr(source, "texts", [])  # of a stream no more than a pass is read anyway
    length = sum(map(len, texts))
    if length <= SAMPLE_CHARACTERS:
        return source, 1.0
    first, room = [], SAMPLE_CHARACTERS
    for text in texts:
        if room <= 0:
            break
        first.append(text[:room])
        room -= len(text)
    return dataclasses.replace(source, texts=first), length / SAMPLE_CHARACTERS


def repeated(loader: Any, times: float, seed: int) -> Any:
    """The loader as if its windows came so many times: a sample, with the size of the run."""
    from torch.utils.data import Subset

    from cleangpt.data import make_dataloader

    windows = len(loader.dataset)
    indices = [index % windows for index in range(round(windows * times))]
    return make_dataloader(
        Subset(loader.dataset, indices), loader.collate_fn, loader.batch_size, seed=seed
    )


def look_at_cost(
    arguments: argparse.Namespace,
    teacher: "Teacher",
    student: "nn.Module",
    loader: Any,
    device: "torch.device",
    output: Path,
) -> "tuple[bool, Finding]":
    """What ``--plan`` says, held against what is free."""
    import psutil

    from cleangpt.metrics_log import format_seconds
    from distillation.cache_plan import free_disk, shown_bytes

    own = argparse.Namespace(**vars(arguments))
    held_out = validation_dataloader(own, teacher, loader) if own.validation_tokens else None
    trainer = build_trainer(own, teacher, student, loader, held_out, device)
    trainer.backbone_trainer.check_disk_room(
        trains_all=arguments.polish_epochs > 0,
        overwrite=arguments.overwrite,
        keeps_start=arguments.keep_start,
    )
    planned = plan(trainer, arguments)
    free = psutil.virtual_memory().available
    found = (
        f"about {format_seconds(planned.seconds)}, {shown_bytes(planned.memory_bytes)} of memory,"
        f" {shown_bytes(planned.disk_bytes)} of {shown_bytes(free_disk(output))} on disk;"
        f" frozen states: {planned.cache.reason}"
    )
    tight = device.type == "cpu" and planned.memory_bytes > free
    advice = f"{shown_bytes(free)} of memory are free: lower --batch_size or --activation_cache_gb."
    return True, Finding(found, advice if tight else "")


def dry_finding(
    arguments: argparse.Namespace,
    teacher: "Teacher",
    student: "nn.Module",
    loader: Any,
    device: "torch.device",
) -> tuple[bool, Finding]:
    """A few steps of every stage on one batch; a loss that rises clearly is told."""
    steps = dry_steps(arguments, teacher, student, next(iter(loader)), device)
    shown = ", ".join(f"{s.stage} {s.first:.3g} to {s.last:.3g}" for s in steps.losses)
    rising = [step.stage for step in steps.losses if step.last > RISE * step.first]
    advice = f"The loss of {', '.join(rising)} rises: lower its learning rate." if rising else ""
    return True, Finding(f"loss on one batch: {shown}", advice or steps.advice)
