"""The report in a real browser: nothing is wider than a phone, nothing is loaded, nothing fails."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fednano.runs import RunFolder, render_report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--hide-scrollbars",
    "--allow-file-access-from-files",
]  # fmt: skip
# The page forbids scripts, so that a frame of the wanted width measures it from outside.
PROBE = """<!doctype html><title>waiting</title><body style="margin:0">
<iframe id="f" src="{report}" style="width:{width}px;height:4000px;border:0"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const page = frame.contentDocument, box = element => element.getBoundingClientRect();
  const free = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg"));
  const wide = free.filter(e => box(e).right > {width} + 1);
  const names = wide.slice(0, 3).map(e => e.tagName + "." + e.className);
  const small = [...page.querySelectorAll(".chart text")].filter(e => box(e).height < 9).length;
  const entries = frame.contentWindow.performance.getEntriesByType("resource");
  const loaded = entries.filter(e => !e.name.startsWith("data:")).length;
  const charts = page.querySelectorAll(".chart").length, across = page.documentElement.scrollWidth;
  const facts = `width=${{across}} wide=${{wide.length}} ${{names}} small=${{small}}`;
  document.body.innerHTML = `<pre>${{facts}} loaded=${{loaded}} charts=${{charts}}</pre>`;
}};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_layout(width: int, sample_run: RunFolder, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    shutil.copytree(sample_run.path, tmp_path / "run")
    report = render_report(RunFolder.open(tmp_path / "run"))
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(report=report.as_uri(), width=width), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
         "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r"<pre>(.*?)</pre>", done.stdout)
    assert found, done.stdout[-500:]
    assert f"width={width} wide=0  small=0 loaded=0 charts=3" == found.group(1)
