"""Pictures of a run's report and of the dashboard, for the pages: ``python docs/screenshots.py RUNS RUN``.

Needs playwright and a Chromium on the machine; nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
MOST_BYTES = 200_000


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def served(runs: Path) -> Iterator[str]:
    """`fednano dashboard` of a folder, in a process of its own; yields its URL."""
    program = str(Path(sys.executable).with_name("fednano"))
    command = [program, "dashboard", "--runs", str(runs), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            process.wait(timeout=30)


def shoot(chromium: Browser, runs: Path, run: str, out: Path) -> list[Path]:
    """Write ``report.png``, ``dashboard.png``, ``dashboard-dark.png`` and ``dashboard-phone.png``.

    Args:
        chromium: a running browser.
        runs: folder of the runs.
        run: id of a finished run in it.
        out: folder to write to.

    Returns:
        What was written; each below 200 kB.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    views = (
        ("dashboard", f"#{run}", DESKTOP, "light"),
        ("dashboard-dark", f"#{run}", DESKTOP, "dark"),
        ("dashboard-phone", f"#{run}", PHONE, "light"),
        ("report", f"runs/{run}/report.html", DESKTOP, "light"),
    )
    with served(runs) as url:
        for name, path, size, scheme in views:
            page = chromium.new_page(viewport=size, color_scheme=scheme)
            page.goto(url + path)
            page.wait_for_selector("svg.chart")
            file = out / f"{name}.png"
            file.write_bytes(_small(page.screenshot()))
            page.close()
            written.append(file)
    return written


def _small(png: bytes) -> bytes:
    """The picture with at most 256 colours: a page of few colours, at a third of the bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    if buffer.tell() > MOST_BYTES:
        raise SystemExit(f"a picture takes {buffer.tell()} bytes; expected at most {MOST_BYTES}. Show less.")
    return buffer.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 3 or CHROMIUM is None:
        raise SystemExit("usage: python docs/screenshots.py RUNS RUN, with a Chromium on the path")
    with browser() as running:
        for each in shoot(running, Path(sys.argv[1]), sys.argv[2], Path(__file__).parent / "images"):
            print(each)
