"""Are the packages that this project installs free of known holes?

    python -m tests.contract.audit [--python PYTHON] [--require_database]

compares the floors in ``pyproject.toml`` with ``advisories.json``, which is as old as its date, and
asks an advisory database about what is installed here, with the ``pip-audit`` of PYTHON. Where none
can be reached it says so. Exit code 0 if nothing is known, 1 if something is, 5 if a database was
required and none was reached.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("advisories.json")
_REQUIREMENT = re.compile(r'"([A-Za-z0-9_.-]+)>=([0-9.]+)"')

Version = tuple[int, ...]


def version(text: str) -> Version:
    """``2.10.0`` as numbers; zeros at the end count for nothing."""
    numbers = [int(part) for part in text.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def floors(pyproject: str) -> dict[str, Version]:
    """The lowest version of each package that ``pyproject.toml`` accepts."""
    found: dict[str, Version] = {}
    for name, lowest in _REQUIREMENT.findall(pyproject):
        found[name.lower()] = min(version(lowest), found.get(name.lower(), version(lowest)))
    return found


def problems(advisories: list[dict[str, Any]], lowest: dict[str, Version]) -> list[str]:
    """What the floors leave open, one sentence each.

    An advisory is met by a floor at its fix, or above its last affected version; one without
    either by what is never called, or by a guard of ours.
    """
    found = []
    for advisory in advisories:
        name, ids = advisory["package"], "/".join(advisory["ids"])
        floor = lowest.get(name)
        if floor is None:
            found.append(f"{ids}: {name} has no floor")
        elif "fixed" in advisory and floor < version(advisory["fixed"]):
            found.append(f"{ids}: {name} may be below {advisory['fixed']}")
        elif "last_affected" in advisory and floor <= version(advisory["last_affected"]):
            found.append(f"{ids}: {name} may be {advisory['last_affected']} or below")
        elif not advisory.keys() & {"fixed", "last_affected", "never_called", "guarded_by"}:
            found.append(f"{ids}: nothing is said against it")
    return found


def installed() -> list[str]:
    """What is installed here, as requirements; ``2.13.0+cpu`` is advised on as ``2.13.0``."""
    found = {
        (each.metadata["Name"].lower(), each.version.split("+")[0])
        for each in metadata.distributions()
    }
    return sorted(f"{name}=={number}" for name, number in found if name != "cleangpt-distillation")


def ask(python: str, service: str) -> tuple[list[str], int] | None:
    """Ask one database about everything installed.

    Args:
        python: The interpreter that has pip-audit.
        service: Its name for the database.

    Returns:
        What is known, one line each, and how many packages nothing is known of; None if no
        database answered. pip-audit calls packages it could not ask about "skipped", and is content
        if all of them are.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "installed.txt")
        wanted.write_text("\n".join(installed()), encoding="utf-8")
        command = [python, "-m", "pip_audit", "--requirement", str(wanted), "--no-deps"]
        command += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
        command += ["--vulnerability-service", service]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        rows = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError, TypeError):
        return None
    return read_answer(rows)


def read_answer(rows: list[dict[str, Any]]) -> tuple[list[str], int] | None:
    """What pip-audit's rows say, as :func:`ask` returns it."""
    skipped = [row for row in rows if "skip_reason" in row]
    if 2 * len(skipped) >= len(rows):
        return None
    known = [
        f"{row['name']} {row['version']}: {hole['id']}, fixed in {hole['fix_versions'] or '-'}"
        for row in rows
        for hole in row.get("vulns", [])
        if not {hole["id"], *hole.get("aliases", [])} & unfixed_ids()
    ]
    return known, len(skipped)


def unfixed_ids() -> set[str]:
    """The advisories that no version closes, and that nothing of ours reaches."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))["advisories"]
    return {
        i for each in table if not each.keys() & {"fixed", "last_affected"} for i in each["ids"]
    }


def main(argv: list[str] | None = None) -> int:
    """Ask, say what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--python", default=sys.executable, help="where pip-audit is installed")
    parser.add_argument("--require_database", action="store_true")
    arguments = parser.parse_args(argv)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = problems(table["advisories"], floors(pyproject))
    for problem in found:
        print(f"floor: {problem}")
    number = len(table["advisories"])
    print(f"{number} advisories known on {table['as_of']}: {len(found)} not met by pyproject.toml")
    answers = (ask(arguments.python, service) for service in ("pypi", "osv"))
    answer = next((each for each in answers if each is not None), None)
    if answer is None:
        print("No advisory database was reached: what was published since then is not looked at.")
        return 1 if found else 5 if arguments.require_database else 0
    known, skipped = answer
    for line in known:
        print(f"known: {line}")
    print(f"{len(installed())} packages: {len(known)} holes, {skipped} not in the database")
    return 1 if found or known else 0


if __name__ == "__main__":
    sys.exit(main())
