"""The client's part as a folder of its own: the same edge, and nothing of the language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from multimodal_folders import KINDS, save
from safetensors import safe_open
from test_textual import KINDS as TEXT_KINDS
from test_textual import saved

from fednano.errors import ModelError
from fednano.models.client_part import MANIFEST, find_client_part, write_client_part
from fednano.models.load import load_edge, load_head, load_language


def whole(kind: str, folder: Path) -> Path:
    if kind in TEXT_KINDS:
        return saved(TEXT_KINDS[kind], folder)
    save(kind, folder)
    return folder


@pytest.mark.parametrize("kind", [*KINDS, *TEXT_KINDS])
def test_a_part_is_the_edge_of_every_kind_of_model(kind: str, tmp_path: Path) -> None:
    model = str(whole(kind, tmp_path / "model"))
    manifest = write_client_part(model, tmp_path / "part")
    ours, theirs = load_edge(str(tmp_path / "part")), load_edge(model)
    assert ours.fingerprint == theirs.fingerprint == manifest["fingerprint"]
    assert ours.prompt("what is it?", "a cat", image=False) == theirs.prompt(
        "what is it?", "a cat", image=False
    )
    with safe_open(str(tmp_path / "part" / "model.safetensors"), "pt") as held:
        sizes = {key: held.get_tensor(key).nbytes for key in held.keys()}  # noqa: SIM118 - not a dict
    assert sum(sizes.values()) == manifest["bytes"]
    assert not [key for key in sizes if ".layers.0." in key and "vis" not in key]
    with pytest.raises(ModelError, match="weights are missing"):
        load_language(str(tmp_path / "part"))


@pytest.mark.parametrize("kind", ["tiny", "gemma3", "qwen2_vl"])
def test_the_head_goes_along_where_labels_stay_at_sites(kind: str, tmp_path: Path) -> None:
    model = "tiny" if kind == "tiny" else str(whole(kind, tmp_path / "model"))
    write_client_part(model, tmp_path / "part", head=True)
    ours, theirs = load_head(str(tmp_path / "part")), load_head(model)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_site_finds_the_part_of_the_run(tmp_path: Path) -> None:
    write_client_part("tiny", tmp_path / "models" / "small")
    assert find_client_part(tmp_path / "models" / "small", "whatever it is called") == str(
        tmp_path / "models" / "small"
    )
    assert find_client_part(tmp_path / "models", "tiny") == str(tmp_path / "models" / "small")
    with pytest.raises(ModelError, match=r"holds the client's part of tiny\. Ask the operator"):
        find_client_part(tmp_path / "models", "llava-hf/llava-1.5-7b-hf")
    with pytest.raises(ModelError, match="the client's part of no model"):
        find_client_part(tmp_path, "tiny")
    (tmp_path / "models" / "small" / MANIFEST).write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        find_client_part(tmp_path / "models", "tiny")


def test_nothing_is_written_over_and_nothing_stays_of_what_failed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        write_client_part("tiny", tmp_path / "there")
    broken = whole("qwen2_vl", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["depth"] = 7
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="weights are missing"):
        write_client_part(str(broken), tmp_path / "part")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "there"]
