"""Evaluate a distilled model against its teacher, from the command line.

    python -m distillation.evaluation.evaluate_distilled_model --model_path RUN

prints a short table and writes JSON, Markdown, plots and one HTML page. ``--help`` is instant:
torch and the rest are imported inside ``main``. From Python, call
``distillation.evaluation.evaluate``.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cleangpt.cli import (
    CommandParser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    program_name,
    run_command,
    setup_logging,
)
from cleangpt.settings_file import add_config_flags, parse_settings, settings_text
from config_distillation import MODEL_TYPES

if TYPE_CHECKING:
    import torch

    from cleangpt.data import TextSource
    from cleangpt.teacher import Teacher
    from distillation.evaluation.loading import LoadedModel
    from distillation.evaluation.results import EvaluationResult, EvaluationSettings

logger = logging.getLogger(__name__)

PROGRAM = "distillation.evaluation.evaluate_distilled_model"
DEFAULT_PROMPTS = 5


def main(argv: list[str] | None = None) -> None:
    """Evaluate, print the table, write the report.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Raises:
        CleanGPTError: For anything the user can mend; ``run_command`` prints it in two lines.
    """
    parser = build_parser()
    arguments, origins = parse_settings(parser, argv)
    setup_logging(arguments.debug)
    if arguments.print_config:
        about = f"Settings of {parser.prog}; flags win over those of --config FILE."
        print(settings_text(vars(arguments), origins, about), end="")
        return

    # Names first: a wrong one is told before the seconds that importing torch takes.
    from cleangpt.data import load_texts

    _check_names(arguments)
    settings = _settings(arguments)
    source = load_texts(
        arguments.dataset_name,
        config_name=arguments.dataset_config_name,
        split=arguments.dataset_split,
        text_column=arguments.dataset_text_column,
        max_samples=arguments.max_samples,
        streaming=arguments.streaming,
    )

    from cleangpt.runtime.device import default_device, resolve_device
    from cleangpt.runtime.threads import set_threads
    from cleangpt.teacher import load_teacher
    from distillation.evaluation.loading import check_same_vocabulary

    device = resolve_device(arguments.device) if arguments.device else default_device()
    logger.info("On %s, %s", device, set_threads(arguments.threads, arguments.num_workers))
    student, baselines = _load_students(arguments, device)
    teacher = load_teacher(
        arguments.teacher_model_name,
        revision=arguments.teacher_revision,
        places=arguments.teacher_device_map,
        device=device,
        trust_remote_code=arguments.trust_remote_code,
    )
    for loaded in (student, *baselines):
        check_same_vocabulary(loaded, teacher.tokenizer)
    result = _evaluate(student, baselines, teacher, source, settings)
    result["environment"]["command"] = shlex.join(
        ["python", "-m", PROGRAM, *(sys.argv[1:] if argv is None else argv)]
    )
    where = Path(arguments.output_dir or student.run_dir / "evaluation")
    _finish(result, where, student)


def _check_names(arguments: argparse.Namespace) -> None:
    """Refuse names that lead nowhere, without importing torch."""
    from cleangpt.hub import local_path
    from cleangpt.teacher_source import check_teacher_name

    for flag, names in (
        ("--model_path", [arguments.model_path]),
        ("--baseline_path", arguments.baseline_path),
    ):
        for name in names:
            local_path(name, flag=flag, suffixes=(".pt", ".gguf"))
    check_teacher_name(arguments.teacher_model_name, revision=arguments.teacher_revision)


def _load_students(
    arguments: argparse.Namespace, device: "torch.device"
) -> "tuple[LoadedModel, list[LoadedModel]]":
    """The student and the baselines."""
    from distillation.evaluation.loading import load_model

    trust = arguments.trust_remote_code
    student = load_model(
        arguments.model_path,
        model_type=arguments.model_type,
        device=device,
        trust_remote_code=trust,
    )
    baselines = [
        load_model(path, device=device, trust_remote_code=trust, flag="--baseline_path")
        for path in arguments.baseline_path
    ]
    return student, baselines


def _evaluate(
    student: "LoadedModel",
    baselines: "list[LoadedModel]",
    teacher: "Teacher",
    source: "TextSource",
    settings: "EvaluationSettings",
) -> "EvaluationResult":
    """Measure, and add what only the command knows: where models and text came from."""
    from cleangpt.data.overlap import OVERLAP_WORTH_A_WARNING
    from distillation.evaluation.evaluator import evaluate
    from distillation.evaluation.loading import share_trained_on
    from distillation.evaluation.training_record import add_local_errors

    names = _names(student, baselines)
    result = evaluate(
        student.model,
        teacher.model,
        teacher.tokenizer,
        source.texts,
        stitches=student.stitches,
        layer_map=_fitting_map(student, teacher),
        baselines={name: loaded.model for name, loaded in zip(names[1:], baselines, strict=True)},
        settings=settings,
        student_name=names[0],
        teacher_name=f"teacher ({Path(teacher.name).name})",
    )
    add_local_errors(result, student.local_errors)
    sources = [teacher.source, student.source, *(loaded.source for loaded in baselines)]
    for model_result, model_source in zip(result["models"], sources, strict=True):
        model_result["source"] = model_source
    data = result["data"]
    data["name"], data["split"], data["fingerprint"] = source.name, source.split, source.fingerprint
    result["notes"][:0] = [*source.notes, *student.notes]
    share = share_trained_on(student, source.texts, teacher.tokenizer)
    if share >= OVERLAP_WORTH_A_WARNING:
        text = f"this text ({source.name}, {source.split})"
        seen = f"The student was trained on {share:.0%} of {text}: its figures say little;"
        result["notes"].insert(0, f"{seen} evaluate on another split.")
    return result


def _fitting_map(student: "LoadedModel", teacher: "Teacher") -> tuple[int, ...] | None:
    """The map of the student's run, unless this teacher has fewer blocks than that one."""
    from cleangpt.blocks import BlockStack

    blocks = BlockStack(teacher.model).num_blocks
    known = student.layer_map
    return known if known is None or max(known) < blocks else None


def build_parser() -> CommandParser:
    """All flags; those of ``_add_measurement_flags`` say how to measure, these what."""
    parser = CommandParser(
        prog=program_name(PROGRAM),
        description="Evaluate a distilled model against its teacher: perplexity, divergence, "
        "hidden states, speed, and generations side by side.",
    )
    add = parser.add_argument
    add("--model_path", required=True, help="a .pt checkpoint, a run directory or a model folder")
    add(
        "--model_type",
        choices=MODEL_TYPES,
        help="the kind of student expected (default: what is saved)",
    )
    add(
        "--baseline_path",
        action="append",
        default=[],
        help="another model for the table, such as the student before distillation; repeatable",
    )
    add(
        "--teacher_model_name", default="builtin", help="teacher by name or path (default: builtin)"
    )
    add("--teacher_revision", help="revision of the teacher on its hub")
    add(
        "--teacher_device_map",
        metavar="PLACES",
        help="where the teacher's blocks lie if not all on the device: auto, or places with numbers"
        " of blocks as cuda=20,cpu=8,disk (default: all on the device)",
    )
    add("--dataset_name", default="builtin", help="data by name or path (default: builtin)")
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split", default="test", help="split to evaluate on (default: test)")
    add("--dataset_text_column", help="column with the text (default: found)")
    add(
        "--max_samples",
        type=non_negative_int,
        default=0,
        help="use the first so many documents (default: 0, all)",
    )
    add(
        "--streaming",
        action="store_true",
        help="read no more than --max_samples, which must be given, for data that do not fit; as"
        " in a training with --streaming (default: off)",
    )
    add("--output_dir", help="where the report goes (default: evaluation/ beside the model)")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the fastest there is")
    add(
        "--trust_remote_code",
        action="store_true",
        help="let code inside a model folder run; off by default",
    )
    add("--debug", action="store_true", help="show tracebacks and debug messages")
    _add_measurement_flags(parser)
    add_config_flags(parser)
    return parser


def _add_measurement_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add(
        "--batch_size",
        type=positive_int,
        default=8,
        help="windows per forward pass; changes no result (default: 8)",
    )
    add(
        "--block_size",
        type=positive_int,
        help="context length in tokens (default: the longest all models share, at most 1024)",
    )
    add(
        "--stride",
        type=non_negative_int,
        default=0,
        help="tokens scored per window (default: 0, half of the context length)",
    )
    add(
        "--max_tokens",
        type=non_negative_int,
        default=0,
        help="score at most so many tokens (default: 0, all)",
    )
    add(
        "--num_workers",
        type=non_negative_int,
        default=0,
        help="processes that prepare batches (default: 0)",
    )
    threads = "threads of the CPU; 0 chooses by the cores it may use (default: 0)"
    add("--threads", type=non_negative_int, default=0, help=threads)
    add(
        "--speed_seconds",
        type=non_negative_float,
        default=4.0,
        help="time budget of the speed measurement; 0 skips it (default: 4)",
    )
    add(
        "--generate_comparisons",
        action="store_true",
        help="let all models continue the same prompts, greedy and sampled, and compare them with"
        " the teacher on text that they write themselves",
    )
    add(
        "--num_comparison_prompts",
        type=positive_int,
        help=f"prompts to use (default: {DEFAULT_PROMPTS}, or all of --prompts_file)",
    )
    add("--prompts_file", help="one prompt per line (default: cut from the data)")
    add("--max_new_tokens", type=positive_int, default=40, help="per generated text (default: 40)")
    add(
        "--temperature",
        type=positive_float,
        default=0.8,
        help="of the sampled texts (default: 0.8)",
    )
    add("--seed", type=non_negative_int, default=0, help="of the sampled texts (default: 0)")


def _finish(result: "EvaluationResult", output_dir: Path, student: "LoadedModel") -> None:
    """Print first: the numbers survive a folder that cannot be written."""
    from cleangpt.safe_text import clean_line
    from distillation.evaluation import tables
    from distillation.evaluation.card_figures import refresh_card
    from distillation.evaluation.report import write_report

    print(tables.text_table(tables.MODEL_COLUMNS, tables.model_rows(result)))
    for note in result["notes"]:
        print(f"note: {clean_line(note, 600)}")
    sys.stdout.flush()
    paths = write_report(result, output_dir, run_dir=student.run_dir)
    print(f"report: {clean_line(str(paths['report.html']), 2000)}")
    others = ", ".join(name for name in paths if name != "report.html")
    print(f"beside it: {others}")
    card = refresh_card(result, student.source, student.run_dir)
    if card is not None:
        print(f"model card: {clean_line(str(card), 2000)}")


def _names(student: "LoadedModel", baselines: "list[LoadedModel]") -> list[str]:
    """Names for the table; two models of one kind are told apart by where they lie."""
    from distillation.evaluation.loading import CHECKPOINT_NAME

    names = [f"student ({student.name})"]
    for baseline in baselines:
        place = Path(baseline.source).name
        place = baseline.run_dir.resolve().name if place in ("final", CHECKPOINT_NAME) else place
        names.append(f"baseline ({baseline.name}, {place})")
    return names


def _settings(arguments: argparse.Namespace) -> "EvaluationSettings":
    """The flags as one checked object, before anything slow is loaded."""
    from cleangpt.errors import UsageError
    from distillation.evaluation.results import EvaluationSettings

    if arguments.prompts_file and not arguments.generate_comparisons:
        raise UsageError(
            "--prompts_file is given without --generate_comparisons: nothing would be generated.",
            "Add --generate_comparisons.",
        )
    prompts: tuple[str, ...] = ()
    if arguments.prompts_file:
        from distillation.evaluation.prompts import read_prompts  # imports torch

        prompts = read_prompts(Path(arguments.prompts_file))
    wanted = arguments.num_comparison_prompts
    count = 0 if prompts or not arguments.generate_comparisons else wanted or DEFAULT_PROMPTS
    return EvaluationSettings(
        seq_len=arguments.block_size or 0,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        max_tokens=arguments.max_tokens,
        num_prompts=count,
        prompts=prompts[:wanted],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        speed_seconds=arguments.speed_seconds,
        num_workers=arguments.num_workers,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
