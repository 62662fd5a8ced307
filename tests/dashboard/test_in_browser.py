"""The dashboard in a real browser: it follows a run, works on a phone and by keyboard, and fails at nothing."""

from __future__ import annotations

import importlib.util
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from watched_runs import ROUNDS, round_rows, served, write_run

from fednano.host.metrics import serve_metrics
from fednano.runs import RunFolder
from fednano.unlearning.jobs.store import Store

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

playwright.expect.set_options(timeout=30_000)

SCRIPT = Path(__file__).parents[2] / "docs" / "screenshots.py"
spec = importlib.util.spec_from_file_location("screenshots", SCRIPT)
assert spec is not None
assert spec.loader is not None
screenshots = importlib.util.module_from_spec(spec)
spec.loader.exec_module(screenshots)

pytestmark = pytest.mark.skipif(screenshots.CHROMIUM is None, reason="no Chromium on this machine")

WIDE = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, .skip'))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"""
NAMELESS = """() => [...document.querySelectorAll('a, button, progress, svg.chart, table')]
  .filter(e => !(e.ariaLabel || e.textContent.trim())).map(e => e.outerHTML.slice(0, 80))"""
# Contrast of every text with what lies behind it, as WCAG 2.2 counts it.
PALE = """() => {
  const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0) return c; }
    return [255, 255, 255]; };
  return [...document.querySelectorAll('body *')]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
    .filter(e => e.checkVisibility() && !e.closest('noscript, .skip')).map(e => {
      const css = getComputedStyle(e), ink = light(rgb(e.closest('svg') ? css.fill : css.color));
      const pair = [ink, light(behind(e.closest('svg') ? e.closest('figure') : e))].sort((a, b) => b - a);
      return [(pair[0] + .05) / (pair[1] + .05), e.tagName + ' ' + e.textContent.slice(0, 30)];
    }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with screenshots.browser() as running:
        yield running


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page that must not complain, nor ask anybody but the dashboard."""
    opened = chromium.new_page(viewport={"width": 360, "height": 780})
    complaints: list[str] = []
    opened.complaints = complaints
    opened.on(
        "console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None
    )
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda each: None if "//127.0.0.1:" in each.url else complaints.append(each.url))
    yield opened
    opened.close()


def test_it_follows_a_run_from_an_empty_folder_on(page: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with served(root) as url:
        page.goto(url)
        playwright.expect(page.locator("#nothing")).to_contain_text("does not exist yet")
        run = write_run(root, "<b>ward</b>", rounds=1)
        playwright.expect(page.locator("#name")).to_have_text(run.id)
        playwright.expect(page.locator("#tiles")).to_contain_text(f"1 / {ROUNDS}")
        playwright.expect(page.locator("#progress progress")).to_have_attribute("value", "1")
        for number in range(2, ROUNDS + 1):
            for row in round_rows(number):
                run.append_metrics(row)
        playwright.expect(page.locator("#tiles")).to_contain_text(f"{ROUNDS} / {ROUNDS}")
        assert page.locator("svg.chart").count() == 3
        assert page.locator("#rounds tbody tr").count() == ROUNDS
        assert page.evaluate(WIDE) == []
        assert page.evaluate(NAMELESS) == []
        for theme in ("system", "light", "dark"):
            playwright.expect(page.locator("#theme")).to_have_text(f"Theme: {theme}")
            assert page.evaluate(PALE) == [], theme
            page.locator("#theme").click()
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write("{damaged\n")
        playwright.expect(page.locator("#problems")).to_contain_text("is damaged and left out")
        # What a run says is text, whatever it says.
        run.append_event("warning", "<img src=x onerror=alert(1)>")
        run.append_metrics(
            {"phase": "federated", "round": 4, "scope": "client", "client": "<script>", "refused": "<i>"}
        )
        playwright.expect(page.locator("#events")).to_contain_text("<img src=x onerror=alert(1)>")
        assert page.locator("#events img, #clients script, #events i").count() == 0
        other = write_run(root, "second", rounds=2)
        playwright.expect(page.locator("#runs li")).to_have_count(2)
        first = page.locator("#runs a", has_text=run.id)
        first.focus()
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#name")).to_have_text(run.id)
        playwright.expect(first).to_have_attribute("aria-current", "true")
        run.close()
        other.close()
        assert page.complaints == []
    playwright.expect(page.locator("#link")).to_contain_text("does not answer", timeout=20_000)


def test_jobs_and_host_load(page: Any, runs: Path) -> None:
    folder = next(runs.glob("*-ward")) / "unlearning"
    Store(folder / "jobs.sqlite")  # the schema of the jobs' own store
    with closing(sqlite3.connect(folder / "jobs.sqlite")) as database, database:
        job = ("u0001", "k", "site-a", "queued", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "{}")
        columns = "id, key, site, state, created, updated, envelope"
        database.execute(f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", job)
    load = {"in_flight": 3, "step_tokens": 1234, "refused_quota": 2}
    with (
        serve_metrics("127.0.0.1:0", lambda: load) as address,
        served(runs, "--host-metrics", f"http://{address}/metrics") as url,
    ):
        page.goto(url)
        playwright.expect(page.locator("#jobs")).to_contain_text("u0001")
        playwright.expect(page.locator("#jobs")).to_contain_text("queued")
        playwright.expect(page.locator("#host-load")).to_contain_text("1,234")
        load["in_flight"] = 7
        tile = page.locator("#host-load .tile", has_text="in flight")
        playwright.expect(tile.locator("strong")).to_have_text("7")
        playwright.expect(page.locator("#host-load")).to_contain_text("refused: quota")
        assert page.evaluate(WIDE) == []
        assert page.complaints == []


@pytest.mark.slow
def test_pictures_for_the_docs(chromium: Any, runs: Path, tmp_path: Path) -> None:
    run = RunFolder.open(root=runs)
    (run.path / "report.html").write_text(
        "<!doctype html><title>r</title><svg class='chart' width='90' height='40'><rect width='50' height='20'/></svg>"
    )
    for picture in screenshots.shoot(chromium, runs, run.id, tmp_path):
        content = picture.read_bytes()
        assert len(content) < screenshots.MOST_BYTES
        width = struct.unpack(">I", content[16:20])[0]
        assert width == (390 if "phone" in picture.stem else 1280)


def test_committed_pictures_are_small() -> None:
    pictures = sorted((SCRIPT.parent / "images").glob("*.png"))
    assert {"report", "dashboard", "dashboard-phone", "dashboard-dark"} <= {path.stem for path in pictures}
    assert all(path.stat().st_size < screenshots.MOST_BYTES for path in pictures)
