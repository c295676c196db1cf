"""One table per section, as JSON for programs and as Markdown for the README."""

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.spread import Spread, number

Cell = str | int | float | Spread


@dataclass
class Section:
    """The result of one section.

    Args:
        title: What was measured, with its sizes.
        columns: The head of the table.
        rows: One list per line; a number, a text, or repeated values.
        notes: Sentences under the table: what bounds it, and what was left out.
        seconds: How long the section took.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, *cells: Cell) -> None:
        """Append a line.

        Raises:
            ValueError: If it does not have a cell for each column.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for the columns {self.columns}.")
        self.rows.append(list(cells))

    def markdown(self) -> str:
        """The table with its title and notes."""
        lines = [f"## {self.title}", "", table_line(self.columns)]
        lines.append(table_line("---" for _ in self.columns))
        lines += [table_line(map(text, row)) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)


def table_line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def text(cell: Cell) -> str:
    """A cell as it is printed."""
    return number(cell) if isinstance(cell, (int, float)) else str(cell)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average_at_start": round(psutil.getloadavg()[0], 1),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def place(about: dict[str, Any]) -> str:
    """The accelerator, if there is one, and the processor."""
    processor = f"{about['cores']} cores of {about['processor']} ({about['capability']})"
    return f"{about['accelerator']}, {processor}" if about["accelerator"] else processor


def processor_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_report(
    sections: dict[str, Section],
    path: Path,
    about: dict[str, Any],
    command: str,
    title: str = "Speed",
) -> Path:
    """Write ``path`` (JSON) and the Markdown file beside it, whose path is returned.

    Args:
        sections: The tables, by name.
        path: The JSON file.
        about: What :func:`machine` said before the measurements.
        command: What takes them again.
        title: The Markdown file's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command,
        "machine": about,
        "sections": {name: asdict(section) for name, section in sections.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    head = [
        f"# {title}",
        "",
        f"`{command}` on {place(about)}, torch {about['torch']}, {about['threads']} threads, load"
        f" average {about['load_average_at_start']} at the start. What is compared took"
        " turns; where there are several values: median (smallest to largest).",
    ]
    bodies = [section.markdown() for section in sections.values()]
    markdown = path.with_suffix(".md")
    markdown.write_text("\n\n".join(["\n".join(head), *bodies]) + "\n", encoding="utf-8")
    return markdown
