"""Attaching to Hugging Face and plain models, groups, plans, statistics, and taking everything out again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fednano.adapters import (
    AdapterLayer,
    AdapterSet,
    Site,
    attach,
    combine_gradients,
    create,
    gradients_of,
    group_sites,
    plan,
    probe,
    select,
    sites_of,
    wire_leaves,
)
from fednano.errors import ConfigError, ModelError, UpdateRefused

QV = "model.layers.*.self_attn.{q,v}_proj"
IDS = torch.arange(12).view(2, 6) % 29


def llama(*, tied: bool = False, device: str = "cpu") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def move(adapters: AdapterSet, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapters.parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))


def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(IDS).logits
    return out.detach()


def test_patterns() -> None:
    model = llama()
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    assert select(model, QV) == names
    assert select(model, "model.layers.{0..1}.self_attn.{q,v}_proj") == names
    assert select(model, ["**.q_proj", "model.layers.?.self_attn.v_proj"]) == names
    assert select(model, ["lm_head", "model.embed_tokens"]) == ["model.embed_tokens", "lm_head"]
    assert len(select(model, "**")) == 2 * 7 + 2
    assert select(model, "model.layers.1.mlp.*") == [
        f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")
    ]


def test_attach_trains_and_detach_restores_everything() -> None:
    model = llama()
    modules = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model)
    model.lm_head.weight.requires_grad_(False)
    adapters = attach(model, create("lora", rank=2), QV, seed=0)
    assert torch.equal(logits(model), before)
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == sorted(
        f"{name}.theta.{leaf}" for name in adapters.layers for leaf in "AB"
    )
    move(adapters)
    after = logits(model)
    assert not torch.allclose(after, before)
    adapters.merge()
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-5)
    adapters.detach()
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), before)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


@pytest.mark.parametrize("name", ["lora", "shira", "loca", "svfit", "mos"])
def test_gradient_checkpointing_of_a_whole_model(name: str) -> None:
    model = llama().train()
    adapters = attach(model, create(name), [QV, "model.layers.*.mlp.down_proj"], seed=0)
    move(adapters)

    def gradients(run: nn.Module) -> list[Tensor]:
        model.zero_grad()
        run(IDS, labels=IDS).loss.backward()
        return [value.grad.clone() for value in adapters.parameters() if value.grad is not None]

    plain = gradients(model)
    model.activation_checkpointing_enable()
    checkpointed = gradients(model)
    assert len(plain) == len(adapters.parameters())
    for got, expected in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(got, expected)


def test_compiled_model_gives_the_same_gradients() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    adapters = attach(model, create("lora", rank=2), "**", seed=0)
    move(adapters)
    x = torch.randn(5, 6)
    model(x).square().sum().backward()
    plain = [value.grad.clone() for value in adapters.parameters()]
    model.zero_grad()
    torch.compile(model, backend="eager", fullgraph=True)(x).square().sum().backward()
    for value, expected in zip(adapters.parameters(), plain, strict=True):
        torch.testing.assert_close(value.grad, expected)


def test_plans_need_no_memory() -> None:
    adapter = create("lora", rank=4)
    with torch.device("meta"):
        big = nn.ModuleDict({"q_proj": nn.Linear(4096, 4096), "up_proj": nn.Linear(4096, 11008)})
    sites = sites_of(big, "*")
    cost = plan(adapter, sites)
    assert cost.parameters == 4 * (4096 + 4096) + 4 * (4096 + 11008)
    assert (cost.uplink_bytes, cost.basis_bytes, cost.sites) == (4 * cost.parameters, 0, 2)
    xs = plan(create("lora-xs", rank=16), sites[:1])
    assert (xs.parameters, xs.uplink_bytes, xs.basis_bytes) == (256, 1024, 4 * 16 * (4096 + 4096))
    with pytest.raises(ModelError, match="on the meta device; load the model's weights first"):
        attach(big, adapter, "*", seed=0)


@pytest.mark.parametrize("name", ["lora", "lora-xs", "mos", "shira", "nola"])
def test_plan_equals_what_is_attached(name: str) -> None:
    model, adapter = llama(), create(name)
    expected = plan(adapter, group_sites(adapter, sites_of(model, QV)))
    adapters = attach(model, adapter, QV, seed=0)
    sent = adapters.travelling()
    assert expected.parameters == adapters.parameter_count() == sum(p.numel() for p in adapters.parameters())
    assert expected.uplink_bytes == adapters.uplink_bytes() == sum(4 * v.numel() for v in sent.values())
    assert expected.basis_bytes == sum(
        v.numel() * v.element_size() for basis in adapters.export_basis().values() for v in basis.values()
    )
    assert {n: leaf.shape for n, leaf in wire_leaves(adapter, adapters.sites()).items()} == {
        n: tuple(v.shape) for n, v in sent.items()
    }


def test_groups_share_pools_and_keep_private_rows() -> None:
    model = llama()
    adapters = attach(model, create("mos", rank=4, pool_rank=2, private_rank=1), QV, seed=0)
    q0, q1 = (adapters.layers[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    v0 = adapters.layers["model.layers.0.self_attn.v_proj"]
    assert q0.theta["pool_A"] is q1.theta["pool_A"]
    assert q0.theta["pool_A"] is not v0.theta["pool_A"]
    assert q0.theta["own_A"] is not q1.theta["own_A"]
    # 2 layers of (16 + 16) and of (16 + 8), at rank pool_rank = 2: what a LoRA of that rank would cost
    assert adapters.parameter_count() == 2 * 2 * (32 + 24)
    assert set(adapters.travelling()) == {
        f"group:{t}/pool_{x}" for t in ("q_proj:16x16", "v_proj:8x16") for x in "AB"
    }
    assert set(adapters.personal()) == {f"{n}/own_{x}" for n in adapters.layers for x in "AB"}
    adapters.resize(2)
    assert q0.theta["pool_A"] is q1.theta["pool_A"]
    assert q0.adapter.rank == 2


def test_travelling_round_trip_and_atomic_refusal() -> None:
    first, second = llama(), llama()
    sender = attach(first, create("lora", rank=2), QV, seed=0)
    receiver = attach(second, create("lora", rank=2), QV, seed=0)
    move(sender)
    sent = sender.travelling()
    untouched = receiver.travelling()
    broken = dict(sent)
    last = max(broken)
    broken[last] = broken[last] * float("inf")
    with pytest.raises(ModelError, match="are NaN or Inf"):
        receiver.load_travelling(broken)
    assert all(torch.equal(value, untouched[name]) for name, value in receiver.travelling().items())
    receiver.load_travelling(sent)
    assert torch.equal(logits(second), logits(first))
    with pytest.raises(
        ModelError, match=r"missing \['model.layers.0.self_attn.q_proj/A'\], unknown \['x/A'\]"
    ):
        receiver.load_travelling(
            {**{k: v for k, v in sent.items() if k != min(sent)}, "x/A": sent[min(sent)]}
        )


def test_shipped_bases_make_different_models_agree() -> None:
    server, client = llama(), llama()
    with torch.no_grad():  # what another linear-algebra library would do: other bits of the same weight
        client.model.layers[0].self_attn.q_proj.weight.mul_(1.0000001)
    ours = attach(server, create("lora-xs", rank=2), QV, seed=0)
    theirs = attach(client, create("lora-xs", rank=2), QV, seed=0)
    with pytest.raises(UpdateRefused) as refused:
        ours.require_fingerprint(theirs.fingerprint())
    assert ours.fingerprint() in str(refused.value)
    assert theirs.fingerprint() in str(refused.value)
    theirs.load_basis(ours.export_basis(), ours.fingerprint())
    ours.require_fingerprint(theirs.fingerprint())
    direct = attach(llama(), create("lora-xs", rank=2), QV, seed=9, bases=ours.export_basis())
    ours.require_fingerprint(direct.fingerprint())
    with pytest.raises(ModelError, match="expected 0000"):
        theirs.load_basis(ours.export_basis(), "0000")
    with pytest.raises(
        ModelError, match=r"got a basis for site 'nowhere'; this model's sites: model.layers.0"
    ):
        theirs.load_basis({"nowhere": {}})


def test_gathered_gradients_are_the_weights_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    ids = torch.randint(0, 7, (4, 5))
    model(ids).square().sum().backward()
    expected = {"0": model[0].weight.grad.T, "1": model[1].weight.grad, "3": model[3].weight.grad}
    with probe(model, "*") as adapters:
        for half in ids.split(2):
            model(half).square().sum().backward()
        stats = gradients_of(adapters)
    assert {type(module) for module in model} == {nn.Embedding, nn.Linear, nn.Tanh}
    for name, gradient in expected.items():
        torch.testing.assert_close(stats[name]["gradient"], gradient)
    total = combine_gradients([stats, stats])
    torch.testing.assert_close(total["1"]["gradient"], 2 * stats["1"]["gradient"].double())
    attach(model, create("lora-sb", rank=2), "{1,3}", seed=0, stats=stats)
    with pytest.raises(ModelError, match="different sites cannot be summed"):
        combine_gradients([stats, {"1": stats["1"]}])


def test_bridge_gradients_and_errors() -> None:
    site = Site("bridge", "bridge", 4, 4)
    bridges = AdapterSet({"bridge": AdapterLayer(create("dense"), site, seed=0)}, seed=0)
    with pytest.raises(ModelError, match="site 'bridge': no gradient; call backward"):
        gradients_of(bridges)
    x, weight = torch.randn(5, 4), torch.randn(5, 4)
    (bridges.layers["bridge"](x) * weight).sum().backward()
    torch.testing.assert_close(gradients_of(bridges)["bridge"]["gradient"], weight.T @ x)
    wrong = AdapterSet({"bridge": AdapterLayer(create("nano", rank=2), site, seed=0)}, seed=0)
    with pytest.raises(ModelError, match="carries adapter 'nano'; gradients are gathered with 'dense'"):
        gradients_of(wrong)


def test_statistics_that_are_missing_or_wrong() -> None:
    model = llama()
    for name, options in (
        ("lora-sb", {}),
        ("shira", {"support": "gradient"}),
        ("loca", {"locations": "gradient"}),
    ):
        with pytest.raises(
            ConfigError, match=r"needs stats\['gradient'\] of shape \(16, 16\); got no statistics"
        ):
            attach(model, create(name, **options), "model.layers.0.self_attn.q_proj", seed=0)
    bad = {"model.layers.0.self_attn.q_proj": {"gradient": torch.full((16, 16), float("nan"))}}
    with pytest.raises(ConfigError, match="with NaN or Inf; expected finite"):
        attach(model, create("lora-sb"), "model.layers.0.self_attn.q_proj", seed=0, stats=bad)
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())


def test_modules_and_weights_that_are_shared() -> None:
    model = llama(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tied, before = model.lm_head.weight, model.lm_head.weight.detach().clone()
    adapters = attach(model, create("lora", rank=2), "lm_head", seed=0)
    move(adapters)
    adapters.merge()
    assert torch.equal(model.model.embed_tokens.weight, before)  # merging gives lm_head a weight of its own
    adapters.detach()
    assert model.lm_head.weight is tied is model.model.embed_tokens.weight
    assert torch.equal(tied, before)

    layer = nn.Linear(4, 4)
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    shared = attach(twice, create("lora", rank=2), "0", seed=0)
    assert twice[0] is twice[2] is shared.layers["0"]
    shared.detach()
    assert twice[0] is twice[2] is layer


# -- bad input -----------------------------------------------------------------------------------------------


def test_patterns_that_match_nothing_list_the_nearest_names() -> None:
    model = llama()
    with pytest.raises(
        ModelError, match=r"'model.layers.\*.attn.q_proj' matches nothing. Nearest names: .*q_proj"
    ):
        attach(model, create("lora"), "model.layers.*.attn.q_proj", seed=0)
    with pytest.raises(
        ModelError, match=r"'model.layers.0.mlp' matches 'model.layers.0.mlp', a LlamaMLP.*gate_proj"
    ):
        select(model, "model.layers.0.mlp")
    with pytest.raises(ModelError, match=r"'model.layers.0.self_attn.z_proj' matches nothing"):
        select(model, "model.layers.0.self_attn.{q,z}_proj")
    with pytest.raises(ModelError, match="unbalanced braces"):
        select(model, "model.{q,v_proj")


def test_sites_that_cannot_be_adapted() -> None:
    model = llama()
    adapters = attach(model, create("lora", rank=2), QV, seed=0)
    with pytest.raises(
        ModelError, match=r"site 'model.layers.0.self_attn.q_proj' already carries adapter .*lora"
    ):
        attach(model, create("lora", rank=2), "model.layers.0.self_attn.q_proj.base", seed=0)
    adapters.detach()
    block = nn.TransformerEncoderLayer(8, 2, 16)
    for name in ("self_attn.out_proj", "linear1"):
        with pytest.raises(
            ModelError, match=f"site '{name}' sits in an nn..* an adapter there would be ignored"
        ):
            attach(block, create("lora", rank=2), name, seed=0)


def test_a_failing_site_leaves_the_model_alone() -> None:
    model = llama()
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match=r"got rank=12 at site 'model.layers.0.self_attn.v_proj'"):
        attach(model, create("lora", rank=12), QV, seed=0)
    assert dict(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_merging_is_all_or_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    good = attach(model, create("lora", rank=2), "0", seed=0)
    bad = attach(model, create("nano", rank=2, act="gelu"), "1", seed=0)
    both = good.joined(bad)
    with pytest.raises(ModelError, match="is not one matrix"):
        both.merge()
    assert not both.layers["0"].merged
    both.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())
