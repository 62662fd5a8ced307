"""The adapter of the tutorial, brought by an installed package: found by name, and what it declares is so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blocks import ROOT, blocks

from fednano.adapters import AdapterLayer, Site, create, names, options, registry
from fednano.errors import ConfigError

NAME = "block-diagonal"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    [code] = [block for block in blocks(ROOT / "docs/tutorials/adapter.md") if block.file]
    assert len([line for line in code.text.splitlines() if line.strip()]) <= 30
    (tmp_path / code.file).write_text(code.text)
    facts = tmp_path / "block_diagonal-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: block-diagonal\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(f"[fednano.adapters]\n{NAME} = block_diagonal:BlockDiagonal\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("block_diagonal", None)
    registry._REGISTRY.pop(NAME, None)


def test_it_is_found_and_is_what_it_says(installed: Path) -> None:
    assert NAME in names()
    assert "block_diagonal" not in sys.modules  # nothing is imported until the name is asked for
    assert options(NAME)["blocks"] == 4
    adapter, site = create(NAME, blocks=2), Site("s", "linear", 6, 4)
    leaves = adapter.trainable(site)
    assert {name: leaf.shape for name, leaf in leaves.items()} == {"D": (2, 2, 3)}
    first, second = torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)

    def change(leaf: torch.Tensor) -> torch.Tensor:
        return adapter.delta(site, {"D": leaf}, {}, None)

    assert torch.equal(change(first)[:2, :3], first[0])
    assert not change(first)[:2, 3:].any()
    torch.testing.assert_close(change((first + second) / 2), (change(first) + change(second)) / 2)
    layer = AdapterLayer(adapter, Site("b", "bridge", 6, 6), seed=0)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), x)  # from zero
    with pytest.raises(ConfigError, match="does not divide"):
        create(NAME, blocks=5).trainable(site)


def test_a_broken_package_is_named(installed: Path) -> None:
    (installed / "block_diagonal.py").write_text("import no_such_module_here\n")
    with pytest.raises(ConfigError, match="announced by an installed package"):
        create(NAME)
    with pytest.raises(ConfigError, match="Did you mean 'block-diagonal'"):
        create("block-diagona")
