"""What the server changes from round to round, and which round a run ends with."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
import torch

from fednano.errors import ConfigError
from fednano.federation.config import RunConfig
from fednano.federation.evaluator import Evaluator, Judgement
from fednano.federation.rounds import Federation, PhaseResult
from fednano.federation.schedules import at_rank, learning_rate_at, rank_at
from fednano.federation.specification import spec_of
from fednano.federation.watching import Watch
from fednano.runs import RunFolder


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_learning_rates_fall_from_the_first_to_the_last_round(kind: str) -> None:
    config = RunConfig(lr_schedule=kind, lr_final=0.2, learning_rate=0.01, rounds=5)
    rates = [learning_rate_at(config, number) for number in range(1, 6)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[2] == pytest.approx(0.006)  # half way, both are at their mean
    assert rates[-1] == pytest.approx(0.002)
    assert rates == sorted(rates, reverse=True)
    assert learning_rate_at(config.changed(lr_schedule="constant"), 4) == 0.01
    assert learning_rate_at(config.changed(rounds=1), 1) == 0.01


def test_clients_train_at_the_rate_of_the_round(laboratory: Any) -> None:
    """Adam's first step moves every element by the learning rate, whatever the gradient."""
    changes: dict[str, Any] = {
        "lr_schedule": "linear",
        "lr_final": 0.1,
        "learning_rate": 0.01,
        "fraction": 0.34,
    }
    fed = laboratory.federation(**changes)
    laboratory.rounds(fed=fed)
    steps = [fed.folder.load_checkpoint(number).tensors["leaf.text.B"] for number in (1, 2)]
    assert float((steps[0] - laboratory.start["text.B"]).abs().max()) == pytest.approx(0.01, rel=1e-3)
    assert float((steps[1] - steps[0]).abs().max()) == pytest.approx(0.001, rel=1e-2)


def test_ranks_of_rounds() -> None:
    config = RunConfig(rank=16, rank_schedule="3:4,5:8")
    assert [rank_at(config, number) for number in range(1, 7)] == [16, 16, 4, 4, 8, 8]


def test_a_change_of_rank_keeps_what_it_can(laboratory: Any) -> None:
    lab = type(laboratory)(laboratory.settings)
    generator = torch.Generator().manual_seed(1)
    leaves = {name: torch.randn(leaf.shape, generator=generator) for name, leaf in lab.start.items()}
    whole = leaves["text.A"].double() @ leaves["text.B"].double()
    grown = at_rank(lab.edge, spec_of(lab.edge, lab.config), leaves, 6)
    assert grown["text.A"].shape == (160, 6)
    torch.testing.assert_close(grown["text.A"].double() @ grown["text.B"].double(), whole)
    cut = at_rank(lab.edge, spec_of(lab.edge, lab.config), grown, 2)
    values = torch.linalg.svdvals(whole)  # Eckart-Young: nothing of rank 2 is nearer
    lost = float((cut["text.A"].double() @ cut["text.B"].double() - whole).norm())
    assert lost == pytest.approx(float(values[2:].norm()), rel=1e-4)
    lab.grid.close()


RANK_SUMS = [("text.A", 0), ("text.B", 1), ("image.A", 0), ("image.B", 1)]
"""Leaves, and the axis that is not their rank."""


@pytest.mark.parametrize("rule", ["fedavg", "flexlora", "fedex"])
def test_a_run_follows_its_rank_schedule(rule: str, laboratory: Any) -> None:
    lab = type(laboratory)(laboratory.settings)
    fed = lab.federation(rule=rule, rank_schedule="1:2,2:3", rounds=3, codec="int8")
    result = lab.rounds(rule, fed=fed)
    ranks = [fed.folder.load_checkpoint(number).tensors["leaf.text.A"].shape[1] for number in (1, 2, 3)]
    assert ranks == [2, 3, 3]
    last = fed.folder.load_checkpoint(3).tensors
    assert all(
        float(last[f"leaf.{name}"].abs().sum(dim=axis).min()) > 0 for name, axis in RANK_SUMS
    )  # no rank is dead
    assert not [row for row in fed.folder.metrics() if "refused" in row]
    assert set(result.accepted.values()) == {3}
    lab.grid.close()


def test_a_tuned_model_of_another_rank_answers(run: Any) -> None:
    from fednano.federation.answer import answer

    path = run(samples=4, batch_size=4, final_samples=4, rank_schedule="2:6", lr_schedule="cosine")
    row = RunFolder.open(path).read_json("predictions.json")[0]
    assert answer(str(path), row["question"], image=path / row["image"], max_new_tokens=3) == row["federated"]


@pytest.mark.parametrize("rule", ["scaffold", "fedsa", "feddpa", "fedadam"])
def test_rules_that_carry_tensors_refuse_a_rank_schedule(rule: str, laboratory: Any) -> None:
    with pytest.raises(ConfigError, match="rank cannot change"):
        laboratory.rounds(rule, rank_schedule="2:8")


class Scripted:
    """An evaluator whose accuracies are given."""

    title = "accuracy"

    def __init__(self, accuracies: list[float]) -> None:
        self.left = list(accuracies)

    def samples(self, count: int) -> list[None]:
        return [None] * 4

    def judge(self, leaves: Any, samples: Any) -> Judgement:
        return Judgement(self.left.pop(0), 1.0, [])


def judged(laboratory: Any, accuracies: list[float], **changes: Any) -> tuple[Federation, PhaseResult]:
    fed = laboratory.federation(rounds=len(accuracies), evaluate_every=1, fraction=0.34, **changes)
    object.__setattr__(fed, "evaluator", cast("Evaluator", Scripted(accuracies)))
    return fed, laboratory.rounds(fed=fed)


def test_early_stop_and_the_best_round(laboratory: Any) -> None:
    fed, result = judged(laboratory, [0.5, 0.7, 0.6, 0.7, 0.9], early_stop=2, keep="best")
    assert result.rounds == 4  # rounds 3 and 4 were no better than round 2
    best = fed.folder.load_checkpoint(2).tensors
    assert all(torch.equal(leaf, best[f"leaf.{name}"]) for name, leaf in result.leaves.items())
    texts = [event["text"] for event in fed.folder.events()]
    assert any("stopped after round 4" in text for text in texts)
    assert any("kept the adapters of round 2" in text for text in texts)


def test_the_last_round_is_kept_by_default(laboratory: Any) -> None:
    fed, result = judged(laboratory, [0.5, 0.4])
    last = fed.folder.load_checkpoint(2).tensors
    assert all(torch.equal(leaf, last[f"leaf.{name}"]) for name, leaf in result.leaves.items())
    assert not fed.folder.file("watch.json").exists()


def test_what_is_watched_survives(laboratory: Any) -> None:
    """A run that ended between a round's checkpoint and its judgement judges that round when it goes on."""
    whole, result = judged(laboratory, [0.5, 0.7, 0.6, 0.6], early_stop=2)
    assert result.rounds == 4
    fed, _ = judged(laboratory, [0.5, 0.7], early_stop=2)
    Watch(seen=1, best_round=1, accuracy=0.5, loss=1.0).save(
        fed.folder
    )  # as if killed before round 2 was judged
    more = laboratory.federation(rounds=4, evaluate_every=1, fraction=0.34, early_stop=2)
    object.__setattr__(more, "folder", fed.folder)
    object.__setattr__(more, "evaluator", Scripted([0.7, 0.6, 0.6]))
    saved = fed.folder.load_checkpoint(2)
    resumed = laboratory.rounds(fed=more, upto=PhaseResult.of_checkpoint(saved.tensors, saved.state))
    assert all(torch.equal(leaf, resumed.leaves[name]) for name, leaf in result.leaves.items())
    assert Watch.load(fed.folder, 4) == Watch.load(whole.folder, 4)


def test_clients_judge_between_rounds(laboratory: Any) -> None:
    fed = laboratory.federation(evaluate_clients_every=2, rounds=3, keep="best", max_new_tokens=2)
    laboratory.rounds(fed=fed)
    rows = [row for row in fed.folder.metrics() if row["scope"] == "client" and "accuracy" in row]
    assert [row["round"] for row in rows] == [2, 2, 2]
    (judged_round,) = [row for row in fed.folder.metrics() if "client_accuracy" in row]
    total = sum(row["samples"] for row in rows)
    assert judged_round["client_accuracy"] == pytest.approx(
        sum(row["accuracy"] * row["samples"] for row in rows) / total
    )
    assert Watch.load(fed.folder, 3).best_round == 2
    assert (
        json.loads(fed.folder.file("watch.json").read_text())["accuracy"] == judged_round["client_accuracy"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_schedule": "x"}, "pairs of round and rank"),
        ({"rank_schedule": "0:3"}, "rounds and ranks from 1"),
        ({"lr_final": 0.0}, "lr-final is 0.0"),
        ({"keep": "best", "evaluate_every": 0}, "there are none"),
        ({"early_stop": 1, "evaluate_every": 0}, "there are none"),
        ({"evaluate_clients_every": 1, "holdout": 0.0}, "holdout is 0"),
        ({"late": "keep"}, "late is 'keep'"),
        ({"codec": "int2"}, "codec is 'int2'"),
        ({"over_select": -0.1}, "over-select is -0.1"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**changes)


@pytest.mark.parametrize("rule", ["flexlora", "hetlora", "nested", "fedex", "flora"])
def test_clients_of_different_rank(rule: str, laboratory: Any) -> None:
    lab = type(laboratory)(laboratory.settings)
    ranks = {"client-000": 2, "client-001": 4, "client-002": 2}
    seen: dict[str, list[int]] = {name: [] for name in ranks}
    fed = lab.federation(rule=rule, client_ranks="2,4", codec="int8" if rule != "flora" else "fp32")
    memory: PhaseResult = lab.rounds(rule, fed=fed)
    rows = [row for row in fed.folder.metrics() if row["scope"] == "client"]
    assert not [row for row in rows if "refused" in row]
    for row in rows:
        seen[row["client"]].append(row["bytes"]["adapter_up"])
    small, large = seen["client-000"], seen["client-001"]
    assert all(few < many for few, many in zip(small, large, strict=True))
    assert memory.leaves["text.A"].shape == (160, 4)
    changes = [memory.tuned[name] for name in memory.tuned if name.endswith((".B", ".up"))]
    assert any(float(leaf.abs().max()) > 0 for leaf in changes)
    lab.grid.close()


def test_ranks_that_cannot_be_merged_are_refused(laboratory: Any) -> None:
    with pytest.raises(ConfigError, match="different ranks"):
        laboratory.rounds("fedavg", client_ranks="2,4")
    for changes, message in (
        ({"client_ranks": "2,8"}, "largest rank"),
        ({"client_ranks": "a"}, "ranks such as"),
        ({"client_ranks": "2", "late": "buffer"}, "Leave one of them out"),
    ):
        with pytest.raises(ConfigError, match=message):
            laboratory.federation(**changes)
