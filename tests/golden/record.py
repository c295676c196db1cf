"""Record the golden trajectory: ``python -m tests.golden.record`` (in a clean checkout).

A change of the file is a change of the numbers, and says why in its commit.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("trajectory.json")


def trajectory() -> list[dict[str, Any]]:
    """Loss and gradient norm of 20 optimizer steps: two blocks, then the head, in float32."""
    import torch

    from distillation import DistillationTrainer
    from tests.builders import batches, tiny_student, tiny_teacher

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            tiny_teacher(),
            tiny_student(),
            None,
            batches(5),
            output_dir=Path(folder) / "run",
            log_interval=1,
            show_progress=False,
        )
        # A least-squares head has next to no gradient, and Adam would blow its rounding up.
        trainer.train(
            1, 1e-3, lm_head_epochs=2, lm_head_lr=1e-3, initialize_head_from_teacher=False
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    kept = ("stage", "step", "loss", "gradient_norm")
    return [{name: e[name] for name in kept} for e in events if e["event"] == "step"]


def main() -> None:
    import torch
    import transformers

    root = Path(__file__).parents[2]
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    others = [line for line in changed.splitlines() if not line.endswith("trajectory.json")]
    if others:
        sys.exit(f"The checkout has uncommitted changes ({others[0]} ...); commit them first.")
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    content = {"environment": environment, "steps": trajectory()}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
