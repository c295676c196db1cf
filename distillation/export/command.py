"""Export a student from the command line; torch is imported inside ``main`` alone."""

from pathlib import Path
from typing import Final

from cleangpt.cli import CommandParser, setup_logging

FORMATS: Final = ("hf", "gpt2", "gguf", "onnx")
GGUF_TYPES: Final = ("F32", "F16")


def main(argv: list[str] | None = None) -> None:
    """Write the export, and say how near it is to the student.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Raises:
        CleanGPTError: For anything the user can mend; ``run_command`` prints it in two lines.
    """
    arguments = build_parser().parse_args(argv)
    setup_logging(arguments.debug)

    # Names and places first: a wrong one is told before the seconds that importing torch takes.
    from cleangpt.hub import local_path
    from cleangpt.safe_text import clean_line
    from distillation.export.target import check_target

    local_path(arguments.source, flag="the first argument", suffixes=(".pt",))
    check_target(Path(arguments.output), overwrite=arguments.overwrite)

    from distillation.export.exporting import export

    done = export(
        arguments.source,
        arguments.format,
        Path(arguments.output),
        overwrite=arguments.overwrite,
        gguf_type=arguments.gguf_type,
        trust_remote_code=arguments.trust_remote_code,
    )
    for note in done.notes:
        print(f"note: {clean_line(note, 600)}")
    print(
        f"largest difference of a logit: {done.difference:.2e}, the largest logit being"
        f" {done.largest_logit:.3g} (limit {done.limit:.0e} of it)"
    )
    print(f"exported: {clean_line(str(done.folder), 2000)}")


def build_parser() -> CommandParser:
    """All flags."""
    parser = CommandParser(
        prog="python -m distillation.export",
        description="Export a student: as a HuggingFace folder with its code, as transformers' own"
        " GPT-2, as a GGUF file for llama.cpp, or as an ONNX graph.",
    )
    add = parser.add_argument
    add("source", metavar="RUN", help="a run directory, its final/ or its .pt file")
    add(
        "--format",
        choices=FORMATS,
        default="hf",
        help="hf: any student; gpt2, gguf: Vanilla students; onnx: any student of ours"
        " (default: hf)",
    )
    add("--output", required=True, help="the folder to make")
    add(
        "--gguf_type",
        choices=GGUF_TYPES,
        default="F32",
        help="how a GGUF file stores matrices; llama.cpp makes smaller ones of it (default: F32)",
    )
    add("--overwrite", action="store_true", help="replace an earlier export there")
    add(
        "--trust_remote_code",
        action="store_true",
        help="let code inside a model folder run; off by default, not needed for our students",
    )
    add("--debug", action="store_true", help="show tracebacks and debug messages")
    return parser
