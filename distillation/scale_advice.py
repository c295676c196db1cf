"""What to do about a plan for many devices: what to spread, where to keep states, what is idle."""

import math

from distillation.cache_plan import shown_bytes
from distillation.scale_plan import ScalePlan
from distillation.scale_sizes import Setup


def advice(plan: ScalePlan, batch_size: int, setup: Setup) -> list[str]:
    """What to change, or why nothing has to be, a line each.

    Args:
        plan: The plan.
        batch_size: Windows per batch, of all devices together.
        setup: How the run is laid out.
    """
    room, count = plan.cluster.kind.memory_bytes, plan.cluster.count
    most = plan.peak.memory.total
    lines = []
    if most > room:
        lines.append(_room_advice(plan, batch_size, setup))
    elif setup.shards_teacher:
        lines.append(
            f"shard: spreading the teacher saves {shown_bytes(int(plan.spread_saves))} per device"
        )
    else:
        lines.append("shard: nothing; every device has room for the whole teacher")
    if batch_size < count:
        idle = count - batch_size
        lines.append(
            f"batch: {batch_size} windows leave {idle} of {count} devices without work;"
            f" --batch_size {count} or more"
        )
    lines.append(_cache_advice(plan))
    if plan.audit_memory > room:
        lines.append(
            f"audit: its sums take {shown_bytes(int(plan.audit_bytes))} per device beside the"
            " teacher, which does not fit: --recipe tutorial --audit_tokens 0"
        )
    if plan.fit_bytes > 0:
        lines.append(
            f"host: fitting the stitches at the end takes {shown_bytes(int(plan.fit_bytes))} of"
            " the host's memory per device"
        )
    return lines


def _room_advice(plan: ScalePlan, batch_size: int, setup: Setup) -> str:
    """What makes room on a device that has too little, the simplest first."""
    room, peak = plan.cluster.kind.memory_bytes, plan.peak.memory
    if peak.states and peak.total - peak.states <= room:
        left = shown_bytes(int(peak.total - peak.states))
        return f"does not fit with states in memory: --activation_cache disk leaves {left}"
    if not setup.shards_teacher and plan.spread_saves > 0:
        left = shown_bytes(int(peak.total - plan.spread_saves))
        fits = "fits" if peak.total - plan.spread_saves <= room else "does not fit either"
        return f"shard: --shard_teacher leaves {left} per device, which {fits}"
    ways = ["a smaller student (it is whole on every device)"]
    if batch_size > plan.cluster.count:
        ways.insert(0, "a smaller --batch_size with --gradient_accumulation_steps")
    if setup.teacher_itemsize > 2:
        ways.insert(0, "--teacher_dtype bf16")
    return f"does not fit: {', '.join(ways)}"


def _cache_advice(plan: ScalePlan) -> str:
    if plan.cache.kind == "off":
        return "cache: off costs a pass through both models per step; --activation_cache auto"
    if plan.kept_share < 1:
        need, kind = plan.needed_bytes, plan.cluster.kind
        way = "--activation_dtype bf16 halves them, more devices share them"
        if need <= kind.disk_bytes:
            on_node = need * min(kind.per_node, plan.cluster.count) / 1e9
            way = f"--activation_cache disk --activation_cache_gb {math.ceil(on_node)} keeps all"
        return f"cache: only {plan.kept_share:.0%} of the states have room: {way}"
    place = "its memory" if plan.cache.kind == "ram" else "its share of the node's drives"
    return f"cache: {plan.cache.kind}; each device keeps its windows' states in {place}"
