"""How much memory is free, a container's own limit included."""

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Free bytes of the memory in which the states of models on ``device`` lie."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_free_in_container()])


def _free_in_container() -> list[int]:
    """What a container's own limit leaves, which the machine's numbers do not show; maybe empty."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return [max(0, limit - used + int(stat["inactive_file"]))]  # cached files give way
    except (OSError, ValueError, KeyError):  # no limit ("max"), or not Linux
        return []
