"""The page in a real browser, in light and dark, on a phone and on a desk: nothing runs over.

A copy of the page gets a script that measures; the page itself has none, and its policy would not
let one run.
"""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distillation.report.__main__ import write_page
from tests.report_samples import audit_of, evaluation_of, stage_row, stage_rows, write_run

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
     if (found := shutil.which(name))),
    None,
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]
WIDTHS = (390, 1280)
MEASURE = """
<script>
const wide = innerWidth, over = [], onTop = [];
const inScroller = e => e.closest('.scroll, nav ul');
for (const e of document.querySelectorAll('body *')) {
  const r = e.getBoundingClientRect();
  if (!inScroller(e) && !e.closest('.skip') && r.width && (r.right > wide + 1 || r.left < -1))
    over.push(e.tagName + ' ' + (e.textContent || '').slice(0, 40) + ' ' + Math.round(r.right));
}
for (const chart of document.querySelectorAll('svg.chart')) {
  const box = chart.getBoundingClientRect();
  const texts = [...chart.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
  texts.forEach(([t, a], i) => {
    if (a.right > box.right + 2 || a.left < box.left - 2) over.push('label ' + t.textContent);
    texts.slice(i + 1).forEach(([u, b]) => {
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > 1.5 && y > 4) onTop.push(chart.getAttribute('aria-label') + ': ' + t.textContent +
                                       ' / ' + u.textContent);
    });
  });
}
const sizes = [...document.querySelectorAll('svg.chart text')].map(
  t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a);
parent.postMessage(JSON.stringify({wide, over, onTop,
  scroll: document.documentElement.scrollWidth, smallest: Math.min(...sizes)}), '*');
</script></body>
"""
# A browser's window is never narrower than 500, a frame is.
FRAME = """<!DOCTYPE html><body><script>
onmessage = event => document.body.setAttribute('data-found', event.data);
</script><iframe src="{name}" style="border:0;width:{width}px;height:9000px"></iframe></body>
"""


def browse(page: Path, *flags: str, width: int, dark: bool = False, height: int = 900) -> str:
    assert BROWSER is not None
    words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{height}"]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", *flags, page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=110, check=True)
    return done.stdout


def measured(page: Path, width: int) -> dict[str, Any]:
    text = re.sub(r"<meta http-equiv=.Content-Security-Policy.*?>", "", page.read_text())
    copy = page.with_name(f"measured-{page.name}")
    copy.write_text(text.replace("</body>", MEASURE))
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.replace("{name}", copy.name).replace("{width}", str(width)))
    dom = browse(frame, "--dump-dom", "--virtual-time-budget=5000", width=1400)
    found = re.search(r'data-found="(.*?)"', dom)
    assert found is not None
    result: dict[str, Any] = json.loads(found.group(1).replace("&quot;", '"'))
    return result


def long_names() -> dict[str, Any]:
    evaluation = evaluation_of()
    for model in evaluation["models"]:
        model["name"] += " of_a_name_without_any_place_to_break_that_goes_on_and_on_and_on"
    evaluation["notes"] = ["x" * 500]
    evaluation["generations"] = 4 * evaluation["generations"]
    return evaluation


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("pages")
    whole = write_run(place / "whole", evaluation=evaluation_of(), audit=audit_of())
    rows = [stage_row(f"block-{block:02d}", block, teacher_block=block) for block in range(32)]
    deep = write_run(place / "deep-" / ("n" * 90), rows, evaluation=long_names(), audit=audit_of())
    bare = write_run(place / "bare", stage_rows(False)[:1], status="running", planned=None)
    made = [write_page([run], str(place / f"{run.name[:8]}.html")) for run in (whole, deep, bare)]
    return [*made, write_page([whole, deep, bare], str(place / "compared.html"))]


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_runs_over_and_labels_are_readable(pages: list[Path], width: int) -> None:
    for page in pages:
        found = measured(page, width)
        assert found["wide"] == width
        assert found["scroll"] <= width, (page.name, found)
        assert not found["over"], (page.name, found["over"])
        assert not found["onTop"], (page.name, found["onTop"])
        assert found["smallest"] >= 9, (page.name, found["smallest"])


def test_it_follows_light_and_dark(pages: list[Path], tmp_path: Path) -> None:
    from PIL import Image

    for width, dark in itertools.product(WIDTHS, (False, True)):
        picture = tmp_path / f"{width}-{dark}.png"
        browse(pages[0], f"--screenshot={picture}", width=width, dark=dark, height=3000)
        image = Image.open(picture).convert("RGB")
        assert image.width == width
        counted = image.getcolors(image.width * image.height)
        assert counted is not None
        _, (red, green, blue) = max(counted)  # type: ignore[misc]
        assert (red + green + blue < 120) if dark else (red + green + blue > 700)
        assert len(counted) > 50, "an empty page"
