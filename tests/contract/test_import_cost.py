"""What importing us, and asking for help, does not load."""

import subprocess
import sys

import pytest

from tests.contract.source_tree import ROOT

COMMANDS = (
    "examples.run_distillation_example",
    "distillation.evaluation.evaluate_distilled_model",
    "distillation.evaluation.lm_eval",
    "distillation.export",
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


def test_importing_distillation_leaves_data_and_plots_alone() -> None:
    done = run_python(
        "import sys, distillation, distillation.distillation_trainer, distillation.losses\n"
        "print([m for m in ('datasets', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_configuration_needs_no_torch() -> None:
    done = run_python("import sys, config_distillation; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("module", COMMANDS)
def test_help_is_instant(module: str) -> None:
    done = run_python(
        "import sys, time\n"
        "started = time.process_time()\n"
        f"import runpy; sys.argv = [{module!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n"
        "    code = stop.code or 0\n"
        "heavy = [m for m in ('torch', 'transformers', 'datasets', 'matplotlib', 'numpy')"
        " if m in sys.modules]\n"
        "print('RESULT', code, heavy, time.process_time() - started < 2.0)\n"
    )
    assert "RESULT 0 [] True" in done.stdout, done.stdout[-600:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("module", "required"), [(COMMANDS[0], []), (COMMANDS[1], ["--model_path", "x"])]
)
def test_unknown_flag_is_a_usage_error(module: str, required: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *required, "--batch_sise", "4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "--batch_size" in done.stderr, f"the nearest flag is named: {done.stderr}"
    assert "Traceback" not in done.stderr
