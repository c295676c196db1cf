"""The whole job in one command: distil, evaluate, and print what came out.

    python -m examples.demo
    python -m examples.demo --teacher smollm2

runs ``examples.run_distillation_example`` and then the evaluation, with the flags in ``RECIPES``.
"""

import sys

from cleangpt.cli import CommandParser, run_command

# Each fits its time on two cores: three minutes and half an hour, evaluation included.
RECIPES = {
    "builtin": [
        *("--recipe", "best", "--student_n_embd", "96", "--student_n_head", "6"),
        *("--max_samples", "100", "--polish_epochs", "2"),
        # The recipe's rates are for widths of some hundreds; so narrow a student takes higher ones.
        *("--lr_per_block", "3e-3", "--polish_lr", "2e-3"),
    ],
    "smollm2": [
        # A third of the teacher's own blocks, those that it can least do without.
        *("--student_model_type", "hf", "--student_n_layer", "10", "--layer_map", "measured"),
        *("--head_tying", "tie", "--recipe", "best", "--max_samples", "100"),
        *("--lr_per_block", "5e-4", "--polish_epochs", "1", "--validation_tokens", "4000"),
    ],
}
EVALUATION = {
    "builtin": ["--max_tokens", "20000", "--speed_seconds", "2", "--num_comparison_prompts", "3"],
    "smollm2": [
        *("--max_tokens", "8000", "--block_size", "256"),
        *("--speed_seconds", "5", "--num_comparison_prompts", "3"),
    ],
}


def main(argv: list[str] | None = None) -> None:
    """Distil the teacher that is asked for, then evaluate its student on held-out text.

    Args:
        argv: Arguments without the program's name; None takes the process's own.
    """
    parser = CommandParser(prog="python -m examples.demo", description="Distil and evaluate.")
    parser.add_argument("--teacher", choices=tuple(RECIPES), default="builtin")
    parser.add_argument("--output_dir", help="default: runs/demo or runs/demo-smollm2")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)

    from distillation.evaluation import evaluate_distilled_model
    from examples import run_distillation_example

    suffix = "" if arguments.teacher == "builtin" else f"-{arguments.teacher}"
    output_dir = arguments.output_dir or f"runs/demo{suffix}"
    teacher = ["--teacher_model_name_or_path", arguments.teacher]
    where = ["--output_dir", output_dir, "--overwrite", "--keep_start"]
    debug = ["--debug"] if arguments.debug else []
    run_distillation_example.main([*teacher, *RECIPES[arguments.teacher], *where, *debug])
    evaluate_distilled_model.main(
        [
            *("--model_path", output_dir),
            *("--baseline_path", f"{output_dir}/start"),
            *("--teacher_model_name", arguments.teacher),
            "--generate_comparisons",
            *EVALUATION[arguments.teacher],
            *debug,
        ]
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
