"""The site: built strictly, complete, and loading nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]), ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {
        str(path.relative_to(tmp_path / "site")): path.read_text()
        for path in (tmp_path / "site").rglob("*.html")
    }
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe|link)[^>]+(?:src|href)="(?:https?:)?//[^"]+"', text)
        assert not loaded, (name, loaded)
    assert "learning-rate" in pages["reference/settings.html"]
    assert "Tune adapters over simulated clients" in pages["reference/api.html"]
    assert "<table>" in pages["benchmarks.html"]
    for picture in ("planes.svg", "report.png", "dashboard.png"):
        assert (tmp_path / "site" / "images" / picture).is_file()
    assert (tmp_path / "site" / "benchmarks" / "results" / "adapters.svg").is_file()
