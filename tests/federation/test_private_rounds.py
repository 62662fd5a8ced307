"""Differential privacy in rounds: the noise in the merged adapter, the cost of a round, and the end of the budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fednano.aggregation import LeafSpec, Spec, Update, create_rule
from fednano.errors import ConfigError, RunError
from fednano.federation.client_state import ClientState
from fednano.federation.config import RunConfig
from fednano.federation.private import add_noise, bounded, charge, round_costs
from fednano.privacy.dp import BudgetSpent, Ledger, norm
from fednano.privacy.secagg.graph import threshold_of

SPEC = Spec({"a": LeafSpec((60, 100)), "b": LeafSpec((4000,))})


def updates(count: int, size: float) -> tuple[dict[str, torch.Tensor], list[Update]]:
    draw = torch.Generator().manual_seed(0)
    start = {n: torch.randn(leaf.shape, generator=draw) for n, leaf in SPEC.leaves.items()}
    made = []
    for k in range(count):
        leaves = {n: leaf + size * torch.randn(leaf.shape, generator=draw) for n, leaf in start.items()}
        made.append(Update(f"c{k}", 0, 300.0, leaves))
    return start, made


@given(st.floats(1e-6, 1e3), st.floats(1e-3, 1e3))
def test_a_change_is_clipped_and_weighs_one(size: float, bound: float) -> None:
    start, (update, *_) = updates(1, size)
    config = RunConfig(dp="client", dp_clip=bound)
    clipped = bounded(update, start, config)
    change = norm([leaf - start[name].double() for name, leaf in clipped.leaves.items()])
    before = norm([leaf.double() - start[name].double() for name, leaf in update.leaves.items()])
    assert change <= bound * (1 + 1e-9)
    assert change == pytest.approx(min(before, bound), rel=1e-6)
    assert clipped.weight == 1.0


@pytest.mark.parametrize("where", ["server", "clients"])
def test_the_merged_noise_has_the_promised_size(where: str) -> None:
    """At the server z C on the sum; at clients, that much from as many as must be left, and no less from more."""
    count, config = 5, RunConfig(dp="client", dp_clip=0.5, dp_noise=2.0)
    least = threshold_of(count, config.secure_threshold)
    start, sent = updates(count, 0.3)
    rule = create_rule("fedavg")
    state, clean = rule.init(SPEC, current=start), rule.init(SPEC, current=start)
    for update in sent:
        clean = rule.add(clean, bounded(update, start, config))
        state = rule.add(
            state, bounded(update, start, config, share=1 / least if where == "clients" else 0.0)
        )
    if where == "server":
        add_noise(state, config)
    merged, plain = rule.finish(state), rule.finish(clean)
    noise = torch.cat([(merged[n].double() - plain[n].double()).reshape(-1) for n in plain]).numpy()
    deviation = 2.0 * 0.5 / count * (1.0 if where == "server" else (count / least) ** 0.5)
    assert stats.kstest(noise, "norm", args=(0.0, deviation)).pvalue > 1e-5
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], len(noise))
    assert low < float((noise**2).sum()) / deviation**2 < high


def test_costs_go_by_the_client_that_is_asked_most_often() -> None:
    names = [f"client-{n:03d}" for n in range(4)]
    config = RunConfig(clients=4, dp="client", dp_noise=3.0)
    assert round_costs(config, names, 7) == Ledger({(3.0, 1.0): 7})
    (asked,) = round_costs(config.changed(fraction=0.5), names, 7).spent.values()
    assert 4 <= asked < 7


@pytest.mark.parametrize("secure", [False, True])
def test_a_run_at_client_level_ends_before_its_budget_does(secure: bool, laboratory: Any) -> None:
    allowed = 2
    price = Ledger().after(1.5, 1.0, allowed).epsilon(1e-5)
    changes = {"dp": "client", "dp_noise": 1.5, "dp_clip": 0.05, "dp_epsilon": price * 1.001, "rounds": 5}
    fed = laboratory.federation(secure_aggregation=secure, **changes)
    result = laboratory.rounds(fed=fed)
    assert result.rounds == allowed
    told = [row["epsilon"] for row in fed.folder.metrics() if row["scope"] == "global"]
    assert told == [Ledger().after(1.5, 1.0, n).epsilon(1e-5) for n in (1, 2)]
    assert "the budget is" in (fed.folder.path / "events.jsonl").read_text()
    assert (result.loss is None) is secure  # whose sum no noise covers


def test_a_run_at_sample_level_ends_when_the_clients_have_spent_theirs(run: Any, tmp_path: Path) -> None:
    settings = {"dp": "sample", "dp_noise": 0.8, "batch_size": 4, "samples": 8, "final_samples": 4}
    path = run(dp_epsilon=4.4, rounds=12, cache_dir=str(tmp_path), **settings)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["scope"] == "client" and row["phase"] == "federated"]
    spent = [row["epsilon"] for row in own if "epsilon" in row]
    assert 0 < max(spent) <= 4.4
    assert not any("loss" in row and not row.get("final") for row in own)
    assert any("BudgetSpent" in row.get("refused", "") for row in own)
    summary = json.loads((path / "summary.json").read_text())
    assert summary["rounds"] < 12
    assert summary["extra"]["privacy"]["epsilon"] == max(spent)
    assert "every client has spent" in (path / "events.jsonl").read_text()
    assert "differential privacy" in (path / "report.html").read_text().lower()


def test_a_ledger_outlives_its_process_and_is_never_begun_anew(tmp_path: Path) -> None:
    config = RunConfig(dp="sample", dp_noise=1.0, dp_epsilon=3.0)
    memory = ClientState(tmp_path, "run", "federated", "site")
    first = charge(config, memory, 0.05, 5)
    assert charge(config, memory, 0.05, 5) > first
    with pytest.raises(BudgetSpent):
        charge(config, memory, 0.5, 5)
    assert charge(config, memory, 0.05, 1) > first  # what is not begun costs nothing
    kept = Ledger.from_json(json.loads((memory.folder / "privacy.json").read_text()))
    assert kept.epsilon(config.dp_delta) <= 3.0
    (memory.folder / "privacy.json").write_text("{")
    with pytest.raises(RunError, match="ledger cannot be read"):
        charge(config, memory, 0.1, 5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dp": "client", "rule": "fisher"}, "merges something else"),
        ({"dp": "client", "rule": "flexlora"}, "merges something else"),
        ({"dp": "client", "rule": "nested"}, "merges something else"),
        ({"dp": "sample", "rule": "fisher"}, "more than noised gradients"),
        ({"dp": "sample", "rule": "scaffold"}, "differential privacy needs"),
        ({"dp": "client", "late": "buffer"}, "late"),
        ({"dp": "sample", "baselines": True}, "baselines"),
        ({"dp": "sample", "adapter": "lora-sb"}, "basis"),
        ({"dp": "both"}, "expected one of off, client, sample"),
        ({"dp": "client", "dp_noise": 0.0}, "dp-noise"),
        ({"dp_delta": 1.0}, "dp-delta"),
    ],
)
def test_what_noise_would_not_cover_is_refused_at_start(
    changes: dict[str, Any], reason: str, run: Any
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(**changes)
