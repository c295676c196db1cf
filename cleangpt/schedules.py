"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no state."""

import math

SCHEDULES = ("constant", "cosine", "linear")


def learning_rate_factor(
    step: int, total_steps: int, *, schedule: str, warmup_ratio: float, min_lr_ratio: float
) -> float:
    """The factor on the peak learning rate at ``step``.

    Rises linearly over the first ``warmup_ratio * total_steps`` steps, then follows the schedule
    down to ``min_lr_ratio`` at the last step.

    Args:
        step: Optimizer step, 0 for the first.
        total_steps: Steps of the whole stage, >= 1.
        schedule: "constant", "cosine" (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, one
            cycle) or "linear".
        warmup_ratio: Share of the steps spent warming up, in [0, 1).
        min_lr_ratio: Factor at the end, in [0, 1]; unused by "constant".

    Raises:
        ValueError: If ``schedule`` is unknown.

    Example:
        >>> learning_rate_factor(0, 10, schedule="cosine", warmup_ratio=0.0, min_lr_ratio=0.1)
        1.0
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"Unknown lr_schedule {schedule!r}; known: {', '.join(SCHEDULES)}.")
    warmup_steps = math.floor(warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    falling = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr_ratio + (1.0 - min_lr_ratio) * falling
