"""No table in README or docs differs from the committed results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_committed_results(page: Path) -> None:
    text = page.read_text()
    assert "<!-- table:" in text
    assert tables.rendered(text) == text, f"{page.name} is not current: python benchmarks/tables.py"
