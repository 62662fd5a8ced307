"""Every rule that `fednano strategies` lists runs with real clients, and does there what makes it special."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fednano.aggregation import rule_names
from fednano.federation import asking
from fednano.federation.client_state import ClientState
from fednano.federation.exchange import Delivery
from fednano.federation.messages import Reply
from fednano.federation.model import client_name
from fednano.federation.rounds import Federation, PhaseResult


def memory_of(fed: Federation, client: int, number: int) -> dict[str, torch.Tensor]:
    state = ClientState(Path(fed.config.cache_dir), fed.folder.id, "federated", client_name(client))
    return load_file(state.folder / f"round-{number:04d}.safetensors")


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[Reply]:
    """Every reply to a training request, as it came off the wire."""
    seen: list[Reply] = []
    real = asking.exchange

    def spy(*args: Any, **kwargs: Any) -> Iterator[Delivery]:
        for delivery in real(*args, **kwargs):
            seen.append(delivery.reply)
            yield delivery

    monkeypatch.setattr(asking, "exchange", spy)
    return seen


def changed(before: PhaseResult | dict[str, torch.Tensor], after: PhaseResult) -> set[str]:
    leaves = before.leaves if isinstance(before, PhaseResult) else before
    return {name for name in leaves if not torch.equal(leaves[name], after.leaves[name])}


@pytest.mark.parametrize("rule", [*rule_names(), "hlora"])
def test_every_rule_runs(rule: str, laboratory: Any) -> None:
    fed = laboratory.federation(rule=rule)
    result = laboratory.rounds(rule, fed=fed)
    assert result.rounds == 2
    assert changed(laboratory.start, result) or result.beside
    assert all(torch.isfinite(leaf).all() for leaf in result.tuned.values())
    assert result.accepted == {client_name(n): 2 for n in range(3)}
    assert not [row for row in fed.folder.metrics() if "refused" in row]


def test_the_metrics_tell_how_far_fedexp_went(laboratory: Any) -> None:
    fed = laboratory.federation(rule="fedexp")
    laboratory.rounds("fedexp", fed=fed)
    steps = [row["merge"]["server_step"] for row in fed.folder.metrics() if row["scope"] == "global"]
    assert len(steps) == 2
    assert min(steps) >= 1.0


@pytest.mark.parametrize("rule", ["scaffold", "feddpa", "flora", "fedadam", "dare"])
def test_same_seed_same_bits(rule: str, laboratory: Any) -> None:
    first, again = laboratory.rounds(rule), laboratory.rounds(rule)
    assert all(torch.equal(leaf, again.tuned[name]) for name, leaf in first.tuned.items())


A, B = {"image.A", "text.A"}, {"image.B", "text.B"}


def test_ffa_keeps_a_and_sends_half_both_ways(laboratory: Any, replies: list[Reply]) -> None:
    fed, plain = laboratory.federation(rule="ffa"), laboratory.rounds("fedavg")
    result = laboratory.rounds("ffa", fed=fed)
    assert changed(laboratory.start, result) == B
    assert all(set(reply.leaves or {}) == B for reply in replies[-6:])
    for way in ("adapter_up", "adapter_down"):
        half = getattr(plain.wire, way) / 2
        assert half < getattr(result.wire, way) < half + 6 * 1000


def test_rolora_alternates(laboratory: Any, replies: list[Reply]) -> None:
    result = laboratory.rounds("rolora", rounds=3)
    assert [set(reply.leaves or {}) for reply in replies] == 3 * [B] + 3 * [A] + 3 * [B]
    first = laboratory.rounds("rolora", rounds=1)
    second = laboratory.rounds("rolora", rounds=2)
    assert changed(laboratory.start, first) == B
    assert changed(first, second) == A
    assert changed(second, result) == B


def test_fedsa_never_sends_b(laboratory: Any, replies: list[Reply]) -> None:
    fed = laboratory.federation(rule="fedsa")
    result = laboratory.rounds("fedsa", fed=fed)
    assert all(set(reply.leaves or {}) == A for reply in replies)
    own = [memory_of(fed, client, 2) for client in range(3)]
    assert all(set(mine) == {f"personal/{name}" for name in B} for mine in own)
    assert not torch.equal(own[0]["personal/text.B"], own[1]["personal/text.B"])
    assert not result.leaves["text.B"].any()  # the server's own B is the untouched start
    assert changed(laboratory.start, result) == A


def test_feddpa_keeps_a_personal_adapter_and_mixes_it(run: Any, tmp_path: Path) -> None:
    small = {"samples": 4, "batch_size": 4, "final_samples": 4}
    plain, path = run(rule="fedavg", **small), run(rule="feddpa", cache_dir=str(tmp_path), **small)
    names = ("adapter.safetensors", "adapter.safetensors")
    ours, theirs = (load_file(folder / name) for folder, name in zip((path, plain), names, strict=True))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # the global adapter is FedAvg's
    own = [load_file(file) for file in sorted(tmp_path.glob("clients/*/federated/*/round-0002.safetensors"))]
    assert len(own) == 3
    assert not torch.equal(own[0]["own/text.B"], own[1]["own/text.B"])
    assert '"personalised"' in (path / "summary.json").read_text()


def test_scaffold_control_variates_sum_to_the_servers(laboratory: Any) -> None:
    fed = laboratory.federation(rule="scaffold", fraction=0.67, rounds=3, learning_rate=0.05)
    result = laboratory.rounds("scaffold", fed=fed)
    assert min(result.accepted.values()) < 3  # somebody sat out, and its variate stays
    for name in laboratory.start:
        own = [
            memory_of(fed, client, result.accepted[client_name(client)])[f"control/{name}"]
            for client in range(3)
            if client_name(client) in result.accepted
        ]
        server = result.memory[f"c/{name}"]
        assert float(server.abs().max()) > 0
        # The server's variate goes down in float32.
        torch.testing.assert_close(sum(own) / 3, server, rtol=0, atol=1e-4 * float(server.abs().max()))


def test_scaffold_corrects_the_steps(laboratory: Any) -> None:
    plain = laboratory.rounds("fedavg", optimizer="sgd", learning_rate=0.05)
    corrected = laboratory.rounds("scaffold", learning_rate=0.05)
    assert changed(plain, corrected) == A | B
    one = laboratory.rounds("scaffold", learning_rate=0.05, rounds=1)  # without variates yet it is FedAvg
    assert not changed(laboratory.rounds("fedavg", optimizer="sgd", learning_rate=0.05, rounds=1), one)


def test_qfedavg_gets_the_loss_before_training(laboratory: Any, replies: list[Reply]) -> None:
    laboratory.rounds("qfedavg", rounds=2)
    assert len({reply.metrics["initial-loss"] for reply in replies}) == 6
    for reply in replies:  # one step a round: its loss is that of the adapters as they came
        assert reply.metrics["initial-loss"] == pytest.approx(reply.metrics["loss"], rel=1e-5)


def test_fedex_is_the_mean_of_products(laboratory: Any, replies: list[Reply]) -> None:
    result = laboratory.rounds("fedex", rounds=1)
    weights = [reply.metrics["samples"] for reply in replies]
    for stream in ("image", "text"):
        products = [r.leaves[f"{stream}.A"].double() @ r.leaves[f"{stream}.B"].double() for r in replies]
        mean = sum(w * p for w, p in zip(weights, products, strict=True)) / sum(weights)
        kept = result.leaves[f"{stream}.A"].double() @ result.leaves[f"{stream}.B"].double()
        beside = (
            result.beside[f"beside/{stream}.down"].double() @ result.beside[f"beside/{stream}.up"].double()
        )
        torch.testing.assert_close(kept + beside, mean, rtol=0, atol=1e-7 * float(mean.abs().max()) + 1e-9)
        assert float(beside.abs().max()) > 0


def test_residuals_act_like_the_adapter_they_replace(laboratory: Any) -> None:
    """FLoRA's stacked adapter is folded beside the model: the same function as adapters that hold the mean itself."""
    edge, leaves = laboratory.edge, dict(laboratory.start)
    generator = torch.Generator().manual_seed(0)
    for name in B:
        leaves[name] = 0.1 * torch.randn(leaves[name].shape, generator=generator)
    rows = torch.randn(5, edge.edge.hidden_size, generator=generator)
    edge.load_travelling(leaves)
    want = edge._adapt("text", rows)
    folded = {f"beside/{s}.down": leaves[f"{s}.A"] for s in ("image", "text")}
    folded |= {f"beside/{s}.up": leaves[f"{s}.B"] for s in ("image", "text")}
    edge.load_travelling({**laboratory.start, **folded})
    torch.testing.assert_close(edge._adapt("text", rows), want)
    edge.load_travelling(laboratory.start)
    assert not edge.beside


def test_flora_starts_afresh_and_its_run_can_be_asked(run: Any) -> None:
    from fednano.errors import ConfigError
    from fednano.exporting import export_run
    from fednano.federation.answer import answer
    from fednano.runs import RunFolder

    path = run(rule="flora", samples=4, batch_size=4, final_samples=4)
    tensors, _ = RunFolder.open(path).load_adapter()
    assert not tensors["text.B"].any()
    assert tensors["beside/text.down"].shape[1] > 4  # stacked: more than one client's rank
    rows = RunFolder.open(path).read_json("predictions.json")[:2]
    for row in rows:
        assert (
            answer(str(path), row["question"], image=path / row["image"], max_new_tokens=3)
            == row["federated"]
        )
    with pytest.raises(
        ConfigError, match="residual beside its adapters"
    ):  # a LoRA checkpoint would leave it out
        export_run(str(path), "peft")


@pytest.mark.parametrize("rule", ["fedex", "rolora", "flexlora"])
def test_lora_adapters_are_products_too(rule: str, laboratory: Any) -> None:
    lab = type(laboratory)(laboratory.settings | {"adapter": "lora", "adapter_options": "alpha=8"})
    try:
        assert lab.federation().spec.products["text"].scale == 2.0
        result = lab.rounds(rule)
        assert changed(lab.start, result)
    finally:
        lab.grid.close()
