"""The one place where ``torch.load`` stands."""

from pathlib import Path
from typing import Any

import torch

from cleangpt.weight_files import check_file


def restricted_load(path: Path) -> Any:
    """Return what a file written by ``torch.save`` holds, on the CPU, without running code from it.

    PyTorch's restricted loader knows tensors and plain containers, and nothing else is ever allowed
    in addition. The file's records are checked before: they may not be larger than the file.

    Raises:
        ValueError: If the file is damaged or foreign, or asks for code to be run.
    """
    check_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the loader raises many types for damaged or foreign files
        raise ValueError(f"{path} is damaged or foreign ({type(error).__name__})") from error
