"""A token table that stays in its file: the same rows, and none of its memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from multimodal_folders import KINDS, save
from test_textual import KINDS as TEXT_KINDS
from test_textual import saved as saved_text

from fednano.adapters import create
from fednano.models import edge as edge_module
from fednano.models import table
from fednano.models.edge import NanoEdge
from fednano.models.files import ModelFiles, find_model
from fednano.models.load import count_parameters, load_edge
from fednano.models.prompt import Prompt
from fednano.models.table import StoredTable, leave_on_disk


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a table is, it stays in its file."""
    monkeypatch.setattr(table, "SMALL_BYTES", 0)


def mapped(tensor: torch.Tensor) -> str:
    """The file whose pages hold a tensor, by this process's map of memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split(" ", 1)[0].partition("-")
        if int(first, 16) <= tensor.data_ptr() < int(last, 16):
            return line.split(None, 5)[-1]
    return ""


def folder_of(kind: str, folder: Path) -> Path:
    if kind in TEXT_KINDS:
        return saved_text(TEXT_KINDS[kind], folder)
    save(kind, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, *TEXT_KINDS])
def test_rows_are_those_of_the_table_in_memory(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(folder_of(kind, tmp_path))
    held = load_edge(folder, dtype=dtype)
    monkeypatch.setattr(table, "SMALL_BYTES", 0)
    stored = load_edge(folder, dtype=dtype)
    every = torch.arange(held.vocabulary)
    assert stored.vocabulary == held.vocabulary
    assert stored.fingerprint == held.fingerprint
    assert stored.embed(every).dtype == dtype
    assert torch.equal(stored.embed(every), held.embed(every))
    assert stored.embed(every.view(-1, 2)).shape == (len(every) // 2, 2, held.hidden_size)
    # Gemma scales what it looks up, which a file cannot.
    assert isinstance(stored.token_embedding, StoredTable) == (kind != "gemma3")


def test_the_rows_lie_in_the_checkpoint(on_disk: None) -> None:
    edge = load_edge("tiny")
    assert isinstance(edge.token_embedding, StoredTable)
    assert mapped(edge.token_embedding.table) == str(find_model("tiny").folder / "model.safetensors")
    held = sum(parameter.numel() for parameter in edge.parameters())
    assert held == count_parameters("tiny")["edge"] - edge.vocabulary * edge.hidden_size


@pytest.mark.parametrize("kind", ["tiny", next(iter(TEXT_KINDS))])
def test_nothing_else_holds_the_table_in_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[torch.nn.Module]] = []

    def leave(files: ModelFiles, module: torch.nn.Module, wanted: Callable[[str], bool]) -> torch.nn.Module:
        loaded.append(weakref.ref(module))
        return leave_on_disk(files, module, wanted)

    monkeypatch.setattr(table, "SMALL_BYTES", 0)
    monkeypatch.setattr(edge_module, "leave_on_disk", leave)
    edge = load_edge(kind if kind == "tiny" else str(folder_of(kind, tmp_path)))
    gc.collect()
    assert [each() for each in loaded] == [None]
    storages = {
        tensor.data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*edge.parameters(), *edge.buffers())
    }
    assert sum(storages.values()) == sum(t.nbytes for t in (*edge.parameters(), *edge.buffers()))


def test_batches_and_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for small in (1 << 40, 0):
        monkeypatch.setattr(table, "SMALL_BYTES", small)
        nano = NanoEdge(load_edge("tiny"), {"text": create("nano", rank=2)}, seed=0).double()
        batch = nano([Prompt((7, 9, 30, 8), (11, 2)), Prompt((5, 6), (2,))], [None, None])
        assert batch.embeds.dtype == torch.float64
        (batch.embeds**2).sum().backward()
        found.append([batch.embeds, batch.labels, *(p.grad for p in nano.layers.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None)


def test_a_table_that_the_checkpoint_does_not_have_stays_in_memory(on_disk: None) -> None:
    files = find_model("tiny")
    edge = load_edge("tiny")
    other = torch.nn.Embedding(edge.vocabulary, edge.hidden_size)
    assert leave_on_disk(files, other, lambda key: "embed_tokens." in key) is other
    larger = torch.nn.Embedding(edge.vocabulary + 8, edge.hidden_size)
    assert leave_on_disk(files, larger, lambda key: True) is larger
    clipped = torch.nn.Embedding(edge.vocabulary, edge.hidden_size, max_norm=1.0)
    assert leave_on_disk(files, clipped, lambda key: True) is clipped


def test_small_tables_stay_in_memory() -> None:
    assert isinstance(load_edge("tiny").token_embedding, torch.nn.Embedding)
