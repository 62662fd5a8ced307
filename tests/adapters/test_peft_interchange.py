"""PEFT as oracle and as exchange format; PEFT is imported by tests only."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fednano.adapters
from fednano.adapters import (
    AdapterLayer,
    AdapterSet,
    Site,
    attach,
    create,
    export_merged,
    export_peft,
    import_peft,
)
from fednano.errors import ModelError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
PATTERNS = ["emb", "conv", "blocks.*.fc"]


class Net(nn.Module):
    """An embedding, a convolution over the sequence as an image, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"fc": nn.Linear(12, 8)}), nn.ModuleDict({"fc": nn.Linear(8, 5)})]
        )

    def forward(self, ids: Tensor) -> Tensor:
        """``(N, 5)`` ids to ``(N, 3, 5)``."""
        image = self.conv(self.emb(ids)[:, None])  # (N, 4, 3, 3)
        x = image.transpose(1, 2).flatten(2)
        for block in self.blocks:
            x = torch.tanh(block["fc"](x))
        return x


IDS = torch.arange(20).view(4, 5) % 11


def move(adapters: AdapterSet, scale: float = 0.3) -> AdapterSet:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in adapters.parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))
    return adapters


# -- oracles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_agrees_with_peft_at_every_kind_of_site(rslora: bool) -> None:
    net, base = Net(), Net()
    adapters = move(attach(net, create("lora", rank=3, alpha=5.0, rslora=rslora), PATTERNS, seed=0))
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=["emb", "conv", "fc"])
    theirs = peft.get_peft_model(base, config)
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for name, layer in adapters.layers.items():
            other, theta = modules[name], layer.theta
            if layer.site.kind == "embedding":
                other.lora_embedding_A["default"].copy_(theta["A"])
                other.lora_embedding_B["default"].copy_(theta["B"])
            else:
                other.lora_A["default"].weight.copy_(theta["A"].view_as(other.lora_A["default"].weight))
                other.lora_B["default"].weight.copy_(theta["B"].view_as(other.lora_B["default"].weight))
    torch.testing.assert_close(net(IDS), theirs(IDS))
    net(IDS).square().sum().backward()
    theirs(IDS).square().sum().backward()
    for name, layer in adapters.layers.items():
        other = modules[name]
        gradient = (
            other.lora_embedding_A["default"].grad
            if layer.site.kind == "embedding"
            else other.lora_A["default"].weight.grad
        )
        torch.testing.assert_close(layer.theta["A"].grad, gradient.flatten(1), rtol=1e-4, atol=1e-6)
        full = other.get_delta_weight("default")
        layer_delta = layer.delta()
        torch.testing.assert_close(
            layer_delta.T if layer.site.kind == "embedding" else layer_delta.view_as(full), full
        )


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 8), (8, 12), (9, 9)])
def test_randlora_agrees_with_peft_in_its_flatten_order(d_in: int, d_out: int) -> None:
    base = nn.Sequential(nn.Linear(d_in, d_out))
    site = Site.of("0", base[0])
    layer = AdapterLayer(create("randlora", rank=4, alpha=12.0), site, seed=0, base=base[0])
    move(AdapterSet({"0": layer}, seed=0))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(d_in, d_out)),
        peft.RandLoraConfig(r=4, randlora_alpha=12, target_modules=["0"], save_projection=True),
    )
    other = theirs.base_model.model[0]
    small, large, n = min(d_in, d_out), max(d_in, d_out), -(-min(d_in, d_out) // 4)
    # PEFT pairs column (basis, rank) of its flattened B with row (rank, basis) of its flattened A.
    ours = layer.basis["B"].permute(1, 2, 0).reshape(large, 4 * n).view(large, n, 4)
    other.randlora_A["default"] = layer.basis["A"][:, None, :].clone()
    other.randlora_B["default"] = ours.clone()
    with torch.no_grad():
        other.randlora_lambda["default"].copy_(layer.theta["lam"].T)
        other.randlora_gamma["default"].copy_(layer.theta["gamma"])
    assert other.randlora_gamma["default"].shape == (n, small)
    torch.testing.assert_close(layer.delta(), other.get_delta_weight("default"), rtol=1e-4, atol=1e-5)


def test_shira_agrees_with_peft() -> None:
    base = nn.Sequential(nn.Linear(12, 8))
    layer = AdapterLayer(create("shira", rank=2), Site.of("0", base[0]), seed=0, base=base[0])
    move(AdapterSet({"0": layer}, seed=0))
    positions = layer.basis["positions"]

    def mask(module: nn.Module, r: int, **_: object) -> Tensor:
        return torch.zeros(8 * 12).index_fill(0, positions, 1.0).view(8, 12)

    config = peft.ShiraConfig(r=2, target_modules=["0"])
    config.mask_fn = mask
    twin = nn.Sequential(nn.Linear(12, 8))
    twin.load_state_dict({name.replace("0.base.", "0."): v for name, v in base.state_dict().items()})
    theirs = peft.get_peft_model(twin, config)
    other = theirs.base_model.model[0]
    with torch.no_grad():
        other.shira_weight["default"].copy_(layer.theta["v"][positions.argsort()])
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), theirs(x))


def test_lora_xs_is_a_lora_with_its_middle_folded_in() -> None:
    net = Net()
    adapters = move(attach(net, create("lora-xs", rank=3, alpha=6.0), "blocks.*.fc", seed=0))
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["fc"]))
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for name, layer in adapters.layers.items():
            u, _, _ = torch.linalg.svd(layer.base.weight, full_matrices=False)
            u = (
                u[:, :3] * (layer.basis["B"] * u[:, :3]).sum(0).sign()
            )  # singular vectors are known up to their sign
            modules[name].lora_A["default"].weight.copy_(u.T @ layer.base.weight)  # S V^T
            modules[name].lora_B["default"].weight.copy_(u @ layer.theta["R"])
    torch.testing.assert_close(net(IDS), theirs(IDS), rtol=1e-4, atol=1e-5)


# -- exchange ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "patterns"),
    [
        ("lora", {"rank": 3, "alpha": 5.0}, PATTERNS),
        ("lora", {"rank": 3, "alpha": 5.0, "rslora": True}, PATTERNS),
        ("ffa", {"rank": 2, "alpha": 3.0}, PATTERNS),
        ("nano", {"rank": 2, "scale": 0.5}, "blocks.*.fc"),
    ],
)
def test_exact_exports_load_in_peft(
    name: str, options: dict[str, object], patterns: list[str] | str, tmp_path: Path
) -> None:
    net = Net()
    report = export_peft(tmp_path, move(attach(net, create(name, **options), patterns, seed=0)))
    assert all(line.error == 0 and str(line).endswith("exact") for line in report)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(loaded(IDS), net(IDS))
    back = Net()
    import_peft(back, tmp_path)
    torch.testing.assert_close(back(IDS), net(IDS))


@pytest.mark.parametrize(
    "name", ["lora-xs", "svfit", "mos", "nola", "randlora", "shira", "loca", "salt", "snella"]
)
def test_other_adapters_export_as_the_nearest_lora(name: str, tmp_path: Path) -> None:
    small = {"salt": {"rank": 1, "top": 2}, "snella": {"rank": 4}, "loca": {"count": 9}}
    options = small.get(name, {"rank": 3, **({"private_rank": 0, "shards": 1} if name == "mos" else {})})
    net = Net()
    adapters = move(attach(net, create(name, **options), "blocks.*.fc", seed=0))
    full = export_peft(tmp_path / "full", adapters, rank=12)
    assert max(line.error for line in full) < 1e-5
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "full")
    torch.testing.assert_close(loaded(IDS), net(IDS), rtol=1e-4, atol=1e-5)
    cut = export_peft(tmp_path / "cut", adapters, rank=1)
    for line, layer in zip(cut, adapters.layers.values(), strict=True):
        spectrum = torch.linalg.svdvals(layer.delta().detach().double())
        best = float(spectrum[1:].norm() / spectrum.norm())
        assert line.error == pytest.approx(best, rel=1e-3, abs=1e-6)
        assert "relative error" in str(line)


def test_ranks_may_differ_between_sites(tmp_path: Path) -> None:
    net = Net()
    two = attach(net, create("lora", rank=2, alpha=6.0), "blocks.0.fc", seed=0).joined(
        attach(net, create("lora", rank=4), "conv", seed=0)
    )
    export_peft(tmp_path, move(two))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Net(), tmp_path)(IDS), net(IDS))
    back = Net()
    assert {name: layer.adapter.rank for name, layer in import_peft(back, tmp_path).layers.items()} == {
        "blocks.0.fc": 2,
        "conv": 4,
    }
    torch.testing.assert_close(back(IDS), net(IDS))


def test_import_of_what_peft_wrote(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        use_rslora=True,
        init_lora_weights=False,
        target_modules=["emb", "conv", "fc"],
        rank_pattern={"blocks.1.fc": 2},
        alpha_pattern={"conv": 9},
        lora_dropout=0.1,
    )
    theirs = peft.get_peft_model(Net(), config).eval()
    theirs.save_pretrained(tmp_path)
    net = Net()
    adapters = import_peft(net, tmp_path)
    net.eval()
    torch.testing.assert_close(net(IDS), theirs(IDS))
    ranks = {name: layer.adapter.rank for name, layer in adapters.layers.items()}
    assert ranks == {"emb": 3, "conv": 3, "blocks.0.fc": 3, "blocks.1.fc": 2}
    export_peft(tmp_path / "again", adapters)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "again").eval()
    torch.testing.assert_close(again(IDS), theirs(IDS))


def test_prefix_moves_names(tmp_path: Path) -> None:
    outer, inner = nn.ModuleDict({"model": Net()}), Net()
    adapters = move(attach(inner, create("lora", rank=2), "blocks.*.fc", seed=0))
    export_peft(tmp_path, adapters, prefix="model.")
    import_peft(outer, tmp_path)
    torch.testing.assert_close(outer["model"](IDS), inner(IDS))
    again = Net()
    import_peft(again, tmp_path, prefix="model.")
    torch.testing.assert_close(again(IDS), inner(IDS))


@pytest.mark.parametrize("name", ["lora", "shira", "tlora", "sltrain"])
def test_merged_export(name: str, tmp_path: Path) -> None:
    net = Net()
    adapters = move(attach(net, create(name, rank=2), "blocks.*.fc", seed=0))
    expected = net(IDS).detach()
    modules = dict(net.named_modules())
    export_merged(tmp_path, net, adapters)
    assert dict(net.named_modules()) == modules
    assert torch.equal(net(IDS), expected)
    plain = Net()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(plain(IDS), expected, rtol=1e-4, atol=1e-5)


def test_merged_export_of_a_hugging_face_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama(tied: bool) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=29, tie_word_embeddings=tied, **sizes)).eval()

    net = llama(False)
    adapters = move(attach(net, create("lora", rank=2), ["lm_head", "**.q_proj"], seed=0))
    export_merged(tmp_path, net, adapters)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, net(IDS).logits, rtol=1e-4, atol=1e-5)
    tied = llama(True)
    on_head = attach(tied, create("lora", rank=2), "lm_head", seed=0)
    with pytest.raises(
        ModelError, match=r"site 'lm_head': its weight is tied to 'model.embed_tokens.weight'"
    ):
        export_merged(tmp_path / "tied", tied, on_head)


def test_peft_is_not_imported_at_run_time() -> None:
    for file in Path(fednano.adapters.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            assert not any(name.split(".")[0] == "peft" for name in imported), file


# -- bad input -----------------------------------------------------------------------------------------------


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    bridge = AdapterLayer(create("nano", rank=2), Site("bridge", "bridge", 4, 4), seed=0)
    with pytest.raises(
        ModelError, match="bridge site 'bridge' has no module in the base model, so PEFT cannot hold it"
    ):
        export_peft(tmp_path, AdapterSet({"bridge": bridge}, seed=0))
    net = Net()
    adapters = attach(net, create("lost", rank=2), "blocks.*.fc", seed=0)
    with pytest.raises(
        ModelError, match=r"'lost' at site 'blocks.0.fc' is not an additive matrix and has no LoRA form"
    ):
        export_peft(tmp_path, adapters)
    adapters.detach()
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ModelError, match=r"conv2d site '0' has 2 groups.*use export_merged"):
        export_peft(tmp_path, attach(grouped, create("lora", rank=2), "0", seed=0))


def test_imports_that_cannot_be_done(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config.json is missing; expected a PEFT checkpoint"):
        import_peft(Net(), tmp_path)
    export_peft(tmp_path, attach(Net(), create("lora", rank=2), "blocks.*.fc", seed=0))
    file, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    for option, value in (("use_dora", True), ("bias", "all"), ("modules_to_save", ["head"])):
        file.write_text(json.dumps({**config, option: value}))
        with pytest.raises(ModelError, match=f"the checkpoint uses {option}=.*merge it with PEFT first"):
            import_peft(Net(), tmp_path)
    file.write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ModelError, match="got peft_type='IA3'; only 'LORA' checkpoints"):
        import_peft(Net(), tmp_path)
    file.write_text(json.dumps(config))
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ModelError, match=r"another model: site 'blocks.0.fc' does not exist here"):
        import_peft(other, tmp_path)
    narrow = Net()
    narrow.blocks[1]["fc"] = nn.Linear(7, 5)
    with pytest.raises(ModelError, match=r"leaf 'A': got shape \(2, 8\), .*expected \(2, 7\)"):
        import_peft(narrow, tmp_path)
    assert not any(isinstance(module, AdapterLayer) for module in narrow.modules())
    first = min(tensors)
    save_file({name: value for name, value in tensors.items() if name != first}, weights)
    with pytest.raises(ModelError, match=r"site 'blocks.0.fc' has only factor B; the checkpoint is damaged"):
        import_peft(Net(), tmp_path)
    save_file({**tensors, "base_model.model.x.lora_magnitude_vector": torch.zeros(1)}, weights)
    with pytest.raises(ModelError, match="is no LoRA factor"):
        import_peft(Net(), tmp_path)
    save_file({**tensors, first: tensors[first] * float("nan")}, weights)
    with pytest.raises(ModelError, match="are NaN or Inf"):
        import_peft(Net(), tmp_path)
