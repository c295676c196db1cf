"""docs/glossary.md explains every key that runs write, and none that they do not."""

import json
import re
from pathlib import Path

import pytest

from tests.contract.source_tree import ROOT

PAGE = ROOT / "docs" / "glossary.md"
# Only what went wrong is named there.
RARE = {"nonfinite"}


def rows(section: str) -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The keys of each event in the metrics of two small runs, and those of a manifest's stages."""
    from tests.builders import batches
    from tests.faults.small_runs import TRAINING, small_trainer

    keys: dict[str, set[str]] = {}
    for inputs in ("student", "teacher"):
        folder = tmp_path_factory.mktemp(inputs)
        trainer = small_trainer(folder, validation_dataloader=batches(1), block_inputs=inputs)
        keys.setdefault("results", set()).update(*trainer.train(**TRAINING)["blocks"])
        for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            keys.setdefault(event["event"], set()).update(event)
        manifest = json.loads((Path(folder) / "run" / "manifest.json").read_text(encoding="utf-8"))
        keys.setdefault("stages", set()).update(*manifest["stages"])
    return keys


def test_every_logged_key_is_explained_and_no_other(written: dict[str, set[str]]) -> None:
    explained = [re.findall(r"`(\w+)`", row[0])[0] for row in rows("Keys")]
    assert len(explained) == len(set(explained))
    assert set(explained) - RARE == set().union(*written.values())
    assert all(len(row) == 4 and row[3] for row in rows("Keys"))


def test_every_event_is_listed_with_its_keys(written: dict[str, set[str]]) -> None:
    listed = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows("Events")}
    events = {name: keys - {"event"} for name, keys in written.items() if name in listed}
    assert set(listed) == set(written) - {"stages", "results"}
    for name in ("step", "epoch", "validation", "chain"):
        assert listed[name] == events[name], name
