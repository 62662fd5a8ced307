"""The tour: committed without outputs, and it runs from top to bottom."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[2] / "notebooks" / "tour.ipynb"


def test_it_is_committed_without_outputs() -> None:
    cells = json.loads(TOUR.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.acceptance
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jupyter_client, about its own paths
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    tour = nbformat.read(TOUR, as_version=4)
    client = nbclient.NotebookClient(tour, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=dict(os.environ))
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert all(
        cell.outputs for cell in code if not cell.source.startswith(("total", "import fednano\n\nSIZE"))
    )
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert len(list(tmp_path.glob("runs/*-*/report.html"))) == 2
