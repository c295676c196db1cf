"""Run EleutherAI's harness on a student and its teacher, from the command line.

    python -m distillation.evaluation.lm_eval --model_path RUN

asks both our offline tasks, prints one table, and writes it as Markdown and JSON beside the run's
evaluation. Any task of the harness will do: ``--tasks lambada_openai,hellaswag``.
"""

import argparse
import importlib.util
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cleangpt.cli import (
    CommandParser,
    non_negative_int,
    positive_int,
    run_command,
    setup_logging,
)

if TYPE_CHECKING:
    from cleangpt.teacher import Teacher
    from distillation.evaluation.harness import Asked, Perplexities
    from distillation.evaluation.loading import LoadedModel

logger = logging.getLogger(__name__)

PROGRAM = "distillation.evaluation.lm_eval"
AGREEMENT = 1e-4
"""Relative difference of the two perplexities that is a warning."""


def main(argv: list[str] | None = None) -> None:
    """Ask both models, print the table, write it.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Raises:
        CleanGPTError: For anything the user can mend; ``run_command`` prints it in two lines.
    """
    arguments = build_parser().parse_args(argv)
    setup_logging(arguments.debug)

    # Names first: a wrong one is told before the seconds that importing torch takes.
    from cleangpt.errors import EnvironmentProblem
    from cleangpt.hub import local_path
    from cleangpt.teacher_source import check_teacher_name

    if importlib.util.find_spec("lm_eval") is None:
        raise EnvironmentProblem(
            "The package lm_eval is not installed.",
            "Install the extra: pip install 'cleangpt-distillation[lm-eval]'.",
        )
    local_path(arguments.model_path, flag="--model_path", suffixes=(".pt", ".gguf"))
    check_teacher_name(arguments.teacher_model_name, revision=arguments.teacher_revision)
    words = sys.argv[1:] if argv is None else argv
    _run(arguments, shlex.join(["python", "-m", PROGRAM, *words]))


def _run(arguments: argparse.Namespace, command: str) -> None:
    from cleangpt.runtime.device import default_device, resolve_device
    from cleangpt.runtime.threads import set_threads
    from cleangpt.teacher import load_teacher
    from distillation.evaluation import harness
    from distillation.evaluation.loading import check_same_vocabulary, load_model

    tasks = [task.strip() for task in arguments.tasks.split(",") if task.strip()]
    include = Path(arguments.include_path) if arguments.include_path else None
    manager = harness.task_manager(tasks, include)
    device = resolve_device(arguments.device) if arguments.device else default_device()
    logger.info("On %s, %s", device, set_threads(arguments.threads, 0))
    options: dict[str, Any] = {
        "device": device,
        "trust_remote_code": arguments.trust_remote_code,
    }
    student = load_model(arguments.model_path, **options)
    teacher = load_teacher(
        arguments.teacher_model_name, revision=arguments.teacher_revision, **options
    )
    check_same_vocabulary(student, teacher.tokenizer)
    asked = harness.Asked(
        tasks=tasks,
        context=harness.shared_context([teacher.model, student.model], arguments.block_size),
        batch_size=arguments.batch_size,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit or None,
        include_path=include,
    )
    scores: dict[str, dict[str, dict[str, float]]] = {}
    ours: dict[str, Perplexities] = {}
    for name, model in _models(student, teacher).items():
        logger.info("Asking the %s", name)
        found = harness.ask(model, teacher.tokenizer, asked, manager)
        scores[name] = harness.scores_of(found)
        both = harness.own_perplexity(model, teacher.tokenizer, asked, found)
        if both is not None:
            ours[name] = both
    where = Path(arguments.output_dir or student.run_dir / "evaluation")
    _finish(scores, ours, asked, where, command)


def _models(student: "LoadedModel", teacher: "Teacher") -> dict[str, Any]:
    """The columns of the table."""
    from cleangpt.safe_text import clean_line

    first = f"teacher ({Path(teacher.name).name})"
    return {
        clean_line(first, 60): teacher.model,
        clean_line(f"student ({student.name})", 60): student.model,
    }


def build_parser() -> CommandParser:
    """All flags."""
    parser = CommandParser(
        prog=f"python -m {PROGRAM}",
        description="Run tasks of EleutherAI's lm_eval on a student and its teacher.",
    )
    add = parser.add_argument
    add("--model_path", required=True, help="a .pt checkpoint, a run directory or a model folder")
    add(
        "--teacher_model_name", default="builtin", help="teacher by name or path (default: builtin)"
    )
    add("--teacher_revision", help="revision of the teacher on its hub")
    add(
        "--tasks",
        default="cleangpt_text,cleangpt_cloze",
        help="tasks of lm_eval, with commas between them; the default ones need no network"
        " (default: 'cleangpt_text,cleangpt_cloze')",
    )
    add("--include_path", help="a folder with task files of your own")
    add("--num_fewshot", type=non_negative_int, help="examples before a question (default: none)")
    add(
        "--limit",
        type=non_negative_int,
        default=0,
        help="ask about the first so many documents of each task (default: 0, all)",
    )
    add("--batch_size", type=positive_int, default=8, help="per forward pass (default: 8)")
    add(
        "--block_size",
        type=positive_int,
        help="context length in tokens (default: the longest that both models read)",
    )
    add("--output_dir", help="where the table goes (default: evaluation/ beside the model)")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the fastest there is")
    add(
        "--threads",
        type=non_negative_int,
        default=0,
        help="threads of the CPU; 0 chooses by the cores it may use (default: 0)",
    )
    add(
        "--trust_remote_code",
        action="store_true",
        help="let code inside a model folder run; off by default",
    )
    add("--debug", action="store_true", help="show tracebacks and debug messages")
    return parser


def _finish(
    scores: "dict[str, dict[str, dict[str, float]]]",
    ours: "dict[str, Perplexities]",
    asked: "Asked",
    output_dir: Path,
    command: str,
) -> None:
    """Print first: the numbers survive a folder that cannot be written."""
    from cleangpt.disk_errors import disk_errors_explained
    from cleangpt.run_directory import write_atomically
    from cleangpt.safe_text import clean_line
    from distillation.evaluation import tables
    from distillation.evaluation.results import without_non_finite
    from distillation.evaluation.safe_text import markdown_block, markdown_line

    columns, rows = table_of(scores, ours)
    print(tables.text_table(columns, rows))
    for name, both in ours.items():
        apart = both.relative_difference
        print(f"{name}: lm_eval and our own perplexity differ by {apart:.1e} of it")
        if not apart <= AGREEMENT:
            logger.warning("That is more than %.0e: please report it.", AGREEMENT)
    sys.stdout.flush()
    result = {
        "command": command,
        "context": asked.context,
        "limit": asked.limit,
        "num_fewshot": asked.num_fewshot,
        "scores": scores,
        "perplexity_per_token": {
            name: {
                "lm_eval": both.harness,
                "ours": both.own,
                "relative_difference": both.relative_difference,
                "num_tokens": both.num_tokens,
            }
            for name, both in ours.items()
        },
        "versions": _versions(),
    }
    table = tables.markdown_table(columns, rows, markdown_line)
    page = f"# lm_eval\n\n{table}\n\nContext {asked.context} tokens.\n\n{markdown_block(command)}\n"
    text = json.dumps(without_non_finite(result), indent=2, allow_nan=False) + "\n"
    with disk_errors_explained(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in (("lm_eval.json", text.encode()), ("lm_eval.md", page.encode())):
        write_atomically(output_dir / name, lambda place, c=content: place.write_bytes(c))  # type: ignore[misc]
        print(f"written: {clean_line(str(output_dir / name), 2000)}")


def table_of(
    scores: "dict[str, dict[str, dict[str, float]]]", ours: "dict[str, Perplexities]"
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and rows: a line per metric, a column per model."""
    from distillation.evaluation.tables import format_number

    names = list(scores)
    rows = [
        (
            f"{task} {metric}",
            *(format_number(scores[name].get(task, {}).get(metric), ",.4f") for name in names),
        )
        for task, metrics in scores[names[0]].items()
        for metric in metrics
    ]
    if ours:
        rows += [
            (label, *(format_number(getattr(ours[name], field), ",.4f") for name in names))
            for label, field in (
                ("perplexity per token, lm_eval", "harness"),
                ("perplexity per token, ours", "own"),
            )
        ]
    return ("task and metric", *names), rows


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("lm_eval", "torch", "transformers")}


if __name__ == "__main__":
    sys.exit(run_command(main))
