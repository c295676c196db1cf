"""Directories of runs as training leaves them, without training: small, and as broken as wanted."""

import json
from pathlib import Path
from typing import Any

from cleangpt.integrity import sealed

HOSTILE = (
    "<script>alert(1)</script>"
    '"><img src=http://evil.example/x onerror=alert(2)> {{ 7 * 7 }} </svg></style>'
    "\x1b[31mred\x1b]0;title\x07 \u202etxet\u202c \x00\x08 ]]>"
)
BLOCKS = 3


def stage_row(stage: str, block: int | None = None, **changes: Any) -> dict[str, Any]:
    row = {
        "stage": stage,
        "first_loss": 1.0,
        "best_loss": 0.5,
        "last_loss": 0.5,
        "validation_losses": [0.9, 0.6],
        "kept_epochs": 1,
        "steps": 20,
        "skipped": 0,
        "tokens": 2000,
        "seconds": 1.5,
    }
    if block is not None:
        error = 0.4 + 0.1 * block
        row |= {"block": block, "teacher_block": 2 * block + 1, "relative_error": error}
        row |= {"verdict": "partly learnt"}
    return {**row, **changes}


def stage_rows(with_logit_stages: bool = True) -> list[dict[str, Any]]:
    rows = [stage_row(f"block-{block:02d}", block) for block in range(BLOCKS)]
    return rows + [stage_row("lm-head"), stage_row("polish")] * with_logit_stages


def events_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    stage = row["stage"]
    kind = "block" if "block" in row else {"lm-head": "head"}.get(stage, stage)
    steps = [
        {
            "event": "step",
            "stage": stage,
            "step": step,
            "loss": 1 / step,
            "tokens_per_second": 900.0,
        }
        for step in range(5, row["steps"] + 1, 5)
    ]
    held_out = [
        {"event": "validation", "stage": stage, "epochs_done": index, "loss": loss}
        for index, loss in enumerate(row["validation_losses"])
    ]
    epoch = {"event": "epoch", "stage": stage, "epoch": 0, "loss": row["last_loss"]}
    return [held_out[0], *steps, epoch, *held_out[1:], {"event": kind, **row}]


def manifest_of(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    planned = [{"stage": row["stage"], "steps": 20, "seconds": 1.0} for row in rows]
    return {
        "format_version": 2,
        "library_version": "0.1.0",
        "run_id": "f" * 32,
        "status": "done",
        "stages": rows,
        "command": "python -m examples.run_distillation_example --output_dir runs/x",
        "seed": 0,
        "device": "cpu",
        "precision": {"used": "fp32", "reason": "it is small"},
        "teacher": {"class": "GPT2LMHeadModel", "name": "teacher", "parameters": 4000},
        "student": {"class": "Vanilla", "parameters": 1000, "config": "0" * 64},
        "student_config": {"model_type": "Vanilla", "n_layer": BLOCKS, "n_embd": 16},
        "total_steps": 20 * len(rows),
        "planned": {"seconds": 5.0, "memory_bytes": 10**6, "disk_bytes": 10**5, "stages": planned},
        "results": {"seconds": 9.0},
        **changes,
    }


def audit_of() -> dict[str, Any]:
    level = {
        "rms": 1.0,
        "token_norm": {"5 %": 1.0, "50 %": 2.0, "95 %": 3.0, "max": 4.0},
        "first_position_ratio": 2.0,
        "largest_channel_share": 0.2,
        "massive_channels": [3, 5],
        "effective_rank": 7.0,
        "rank_floor": [0.5, 0.2],
        "raw_rank_floor": [0.4, 0.1],
    }
    levels = [{"level": index, **level} for index in range(2 * BLOCKS + 1)]
    return {"student_width": 16, "floor_widths": [8, 32], "levels": levels}


OWN_TEXT = {
    "num_windows": 3,
    "prompt_tokens": 8,
    "new_tokens": 24,
    "text_loss_nats": 3.0,
    "text_repetition": 0.125,
    "models": [
        {
            "name": "student (Vanilla)",
            "kl_text_nats": 0.3,
            "kl_text_quarters": [0.3, 0.3, 0.3, 0.2],
            "kl_nats": 0.4,
            "kl_quarters": [0.3, 0.4, 0.4, 0.5],
            "teacher_loss_nats": 3.5,
            "repetition": 0.625,
        }
    ],
}


def evaluation_of() -> dict[str, Any]:
    def model(name: str, role: str, perplexity: float) -> dict[str, Any]:
        counts = {"parameters": 4000, "embedding_parameters": 500, "non_embedding_parameters": 3500}
        shape = {"size_bytes": 16000, "num_blocks": 3, "hidden_size": 16, "vocab_size": 99}
        quality = {"loss_nats": 3.0, "perplexity": perplexity, "perplexity_ratio": 1.5}
        quality |= {"bits_per_byte": 1.0, "kl_nats": 0.3, "top1_agreement": 0.6, "num_tokens": 100}
        quality["calibration_error"] = 0.05
        speed = {"forward_tokens_per_second": 1e3, "decode_tokens_per_second": 10.0, "repeats": 3}
        return {
            "name": name,
            "role": role,
            "source": "here",
            "quality": quality,
            "size": {**counts, **shape, "context_length": 64},
            "speed": {**speed, "peak_memory_bytes": None},
        }

    blocks = [
        {
            "student_block": block,
            "teacher_block": 2 * block + 1,
            "mse": 0.5,
            "relative_error": 0.5 + 0.1 * block,
            "local_error": 0.4,
            "cosine": 0.8,
        }
        for block in range(BLOCKS)
    ]
    hybrids = [{"student_block": b, "kl_alone": 0.1, "kl_chained": 0.2 * b} for b in range(BLOCKS)]
    similar = [[0.1 * (row + column) for column in range(2 * BLOCKS)] for row in range(BLOCKS)]
    generation = {"mode": "greedy", "prompt": "Once", "reference": " upon a time"}
    text = {"name": "builtin", "split": "test", "fingerprint": "0" * 64, "num_documents": 2}
    return {
        "format_version": 1,
        "models": [
            model("teacher (tiny)", "teacher", 20.0),
            model("student (Vanilla)", "student", 30.0),
            model("baseline (Vanilla, start)", "baseline", 900.0),
        ],
        "hidden_states": {
            "stitch": "saved", "num_positions": 100, "blocks": blocks,
            "hybrids": hybrids, "similarity": similar,
        },
        "generations": [{**generation, "continuations": {"student (Vanilla)": " more"}}],
        "generation_settings": {"max_new_tokens": 4},
        "own_text": OWN_TEXT,
        "data": {**text, "num_tokens": 100, "num_bytes": 400, "seq_len": 64, "stride": 32,
                 "num_windows": 3},
        "settings": {},
        "environment": {"torch": "2", "command": "python -m evaluate"},
        "notes": ["A note."],
        "non_finite": {},
    }  # fmt: skip


def write_run(
    folder: Path,
    rows: list[dict[str, Any]] | None = None,
    *,
    evaluation: dict[str, Any] | None = None,
    audit: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    going_on: list[dict[str, Any]] | None = None,
    **manifest: Any,
) -> Path:
    """A run's directory.

    Args:
        folder: Made here.
        rows: What its finished stages said.
        evaluation: Its ``results.json``; None leaves it out.
        audit: Its ``audit.json``; None leaves it out.
        settings: Its ``config.json``; None writes those of the recipe "best".
        going_on: Events of a stage that is not done.
        **manifest: Values of the manifest that are others.
    """
    from distillation.recipes import RECIPES

    rows = stage_rows() if rows is None else rows
    best = {**RECIPES["best"].options, **RECIPES["best"].training, "log_interval": 5}
    settings = {**best, "schedule": "sequential"} if settings is None else settings
    folder.mkdir(parents=True)
    events = [event for row in rows for event in events_of(row)] + (going_on or [])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest_of(rows, **manifest))))
    if audit is not None:
        (folder / "audit.json").write_text(json.dumps(audit))
    if evaluation is not None:
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "results.json").write_text(json.dumps(evaluation))
    return folder
