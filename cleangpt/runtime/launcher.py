"""What ``accelerate launch`` and ``torchrun`` tell each process of a run, in the environment.

Standard library only: commands ask before they import torch.
"""

from collections.abc import Mapping


def launched(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and number of processes as a launcher says them; needs no group and no message."""
    if "MASTER_ADDR" not in environment or "RANK" not in environment:
        return 0, 1
    return int(environment["RANK"]), int(environment.get("WORLD_SIZE", "1"))


def on_this_machine(environment: Mapping[str, str]) -> int:
    """How many of the processes share this machine's cores and memory."""
    if launched(environment)[1] == 1:
        return 1
    return max(1, int(environment.get("LOCAL_WORLD_SIZE", "1")))
