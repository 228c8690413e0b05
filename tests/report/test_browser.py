"""The page in a real browser: what is in the DOM, that it is not blank, and that it fits a desktop and a phone."""

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from run_data import RunData

from pipeline.report.page import write_report

WIDTHS = (1200, 390)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
MEASURE = """<!DOCTYPE html>
<iframe id="page" style="width: {width}px; height: 1600px; border: 0" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const frame = document.getElementById("page"), root = frame.contentDocument.documentElement;
  const right = (node) => node.getBoundingClientRect().right;
  const wide = [...root.querySelectorAll("body *")].filter(
    (node) => !node.closest(".scroll, pre") && right(node) > {width} + 1);
  const clipped = [...root.querySelectorAll("svg text")].filter((node) => {{
    const plot = node.ownerSVGElement.getBoundingClientRect(), box = node.getBoundingClientRect();
    return box.left < plot.left - 1 || box.right > plot.right + 1 || box.top < plot.top - 1 || box.bottom > plot.bottom + 1;
  }});
  document.documentElement.dataset.measured = [
    frame.contentWindow.innerWidth, root.scrollWidth, wide.length, clipped.length].join(" ");
}};
</script>"""
"""A frame of a phone's width, which Chromium's own window cannot have, and how far the page in it reaches."""

Browse = Callable[..., str]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """browse(page, width, *flags): what Chromium prints about a page."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the PATH: install the Debian package chromium")

    def run(page: Path, width: int, *flags: str) -> str:
        profile = f"--user-data-dir={tmp_path / f'profile-{width}-{len(list(tmp_path.iterdir()))}'}"
        command = [chromium, *FLAGS, profile, f"--window-size={width},1600", *flags, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    return run


@pytest.fixture
def page(make_run: Callable[..., RunData], tmp_path: Path) -> Path:
    """The report of a whole run, hostile ids included."""
    write_report(make_run(hostile=True).write(tmp_path / "run"))
    return tmp_path / "run" / "report.html"


def test_the_browser_finds_headings_verdict_and_plots(browse: Browse, page: Path) -> None:
    dom = browse(page, 1200, "--dump-dom")
    headings = re.findall(r"<h2>(.*?)</h2>", dom)
    assert headings[:3] == ["Training from each start", "What was merged", "Leaderboard"]
    assert "reaches the base's final validation loss" in dom
    assert len(re.findall(r'<svg class="plot"', dom)) == 5
    assert "<script" not in dom


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(browse: Browse, page: Path, width: int) -> None:
    frame = page.with_name("frame.html")
    frame.write_text(MEASURE.format(width=width, page=html.escape(page.read_text())))
    measured = re.search(r'data-measured="([\d ]+)"', browse(frame, 1300, "--dump-dom"))
    assert measured
    assert [int(number) for number in measured[1].split()] == [width, width, 0, 0]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_not_blank(browse: Browse, page: Path, width: int) -> None:
    shot = page.with_name(f"shot-{width}.png")
    browse(page, width, f"--screenshot={shot}")
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).astype(np.uint8)
    assert pixels.shape[:2] == (1600, width)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    dark_share = float((pixels.max(axis=2) < 100).mean())
    assert 0.005 < dark_share < 0.5
