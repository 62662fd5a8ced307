"""Adapter checkpoints: everything back, and clear refusals for the wrong model, rank or basis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fednano.adapters import (
    AdapterSet,
    attach,
    attach_checkpoint,
    create,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from fednano.errors import ModelError

OPTIONS: dict[str, dict[str, object]] = {
    "lora": {"rank": 2, "alpha": 4.0},
    "ffa": {"rank": 2},
    "lora-xs": {"rank": 2},
    "shira": {"rank": 1, "support": "magnitude"},
    "nola": {"rank": 2, "coefficients_a": 3, "coefficients_b": 3},
    "mos": {"rank": 3},
    "lost": {"rank": 2},
}


def model(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4), nn.Linear(4, 4))


def trained(name: str, net: nn.Module, *, seed: int = 3, **more: object) -> AdapterSet:
    adapters = attach(net, create(name, **{**OPTIONS[name], **more}), "{0,2}", seed=seed)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in adapters.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return adapters


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_k_save_load_same_outputs(name: str, tmp_path: Path) -> None:
    net = model()
    adapters = trained(name, net)
    x = torch.randn(5, 6)
    save_checkpoint(tmp_path, adapters, personal=True)
    fresh = model()
    loaded = attach_checkpoint(fresh, tmp_path)
    assert torch.equal(fresh(x), net(x))
    assert loaded.fingerprint() == adapters.fingerprint()
    again = model()
    other = attach(again, adapters.layers["0"].adapter, "{0,2}", seed=3)
    load_checkpoint(tmp_path, other)
    assert torch.equal(again(x), net(x))


def test_personal_leaves_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    adapters = trained("mos", model())
    save_checkpoint(tmp_path, adapters)
    assert read_checkpoint(tmp_path).personal == {}
    assert not [name for name in load_file(tmp_path / "adapter.safetensors") if "own_" in name]


def test_seeded_bases_are_not_stored(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, trained("ffa", model()))
    assert {name.split("/")[0] for name in load_file(tmp_path / "adapter.safetensors")} == {"shared"}


def test_checkpoints_for_something_else(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, trained("lora", model()))
    with pytest.raises(
        ModelError, match=r"for another model: site '0' is \['linear', 8, 6\] there and .* 10, 6\] here"
    ):
        load_checkpoint(tmp_path, trained("lora", model(10)))
    with pytest.raises(ModelError, match=r"holds adapter .*\"rank\": 2.*; site '0' carries .*\"rank\": 3"):
        load_checkpoint(tmp_path, trained("lora", model(), rank=3))
    with pytest.raises(ModelError, match="another model: 1 of its 2 sites do not exist here, such as '2'"):
        attach_checkpoint(nn.Sequential(nn.Linear(6, 8)), tmp_path)
    wrong = model(10)
    with pytest.raises(ModelError, match="another model"):
        attach_checkpoint(wrong, tmp_path)
    assert {type(module) for module in wrong} == {nn.Linear, nn.Tanh}


def test_checkpoints_of_another_basis(tmp_path: Path) -> None:
    saved = trained("ffa", model())
    save_checkpoint(tmp_path / "seed", saved)
    other = trained("ffa", model(), seed=4)
    with pytest.raises(ModelError, match="attach with seed=3") as refused:
        load_checkpoint(tmp_path / "seed", other)
    assert saved.fingerprint() in str(refused.value)
    assert other.fingerprint() in str(refused.value)
    save_checkpoint(tmp_path / "weight", trained("lora-xs", model()))
    file = tmp_path / "weight" / "adapter.safetensors"
    tensors = load_file(file)
    tensors["basis/0/A"] = tensors["basis/0/A"] * 1.01
    save_file(tensors, file)
    with pytest.raises(
        ModelError, match=r"after loading the shipped basis this model has fingerprint .*, expected "
    ):
        attach_checkpoint(model(), tmp_path / "weight")


def test_damaged_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"adapter.json is missing; expected a folder with adapter.safetensors"
    ):
        read_checkpoint(tmp_path)
    save_checkpoint(tmp_path, trained("lora", model()))
    file, description = tmp_path / "adapter.safetensors", tmp_path / "adapter.json"
    tensors = load_file(file)
    for value in (float("nan"), float("-inf")):
        save_file({**tensors, "shared/0/A": tensors["shared/0/A"] * 0 + value}, file)
        with pytest.raises(ModelError, match="leaf 'A': 12 of 12 numbers are NaN or Inf"):
            attach_checkpoint(model(), tmp_path)
    save_file({**tensors, "junk": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="unknown tensor 'junk'"):
        read_checkpoint(tmp_path)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="the checkpoint is damaged"):
        read_checkpoint(tmp_path)
    save_file(tensors, file)
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(ModelError, match="got checkpoint format 99; this version reads format 1"):
        read_checkpoint(tmp_path)
    description.write_text("{")
    with pytest.raises(ModelError, match="the checkpoint is damaged"):
        read_checkpoint(tmp_path)
    description.write_text(json.dumps({"format": 1}))
    with pytest.raises(ModelError, match=r"missing \['adapter', 'fingerprint'"):
        read_checkpoint(tmp_path)


def test_one_adapter_per_checkpoint(tmp_path: Path) -> None:
    net = model()
    two = attach(net, create("lora", rank=2), "0", seed=0).joined(
        attach(net, create("lora", rank=3), "2", seed=0)
    )
    with pytest.raises(ModelError, match="a checkpoint holds one adapter; got 2"):
        save_checkpoint(tmp_path, two)
