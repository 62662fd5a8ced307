"""Whole unlearning jobs on a finished run: what is forgotten, what stays, and that nothing else is touched."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fednano.errors import ConfigError, DataError, RunError
from fednano.federation.config import RunConfig
from fednano.federation.server import config_of
from fednano.federation.simulation import simulate
from fednano.models.dividing import language_fingerprint
from fednano.runs import RunFolder, make_view
from fednano.runs.tombstones import Tombstone, Tombstones, sample_hash, write_tombstones
from fednano.training.answers import answer_losses
from fednano.unlearning.measure import Comparison, Measurement, Perturbed, against_reference
from fednano.unlearning.metrics import ForgetQuality
from fednano.unlearning.outcome import RoundRecord, UnlearnOutcome, UnlearnRequest
from fednano.unlearning.retrain import retrain, starting_point
from fednano.unlearning.runner import unlearn
from fednano.unlearning.sites import first_exposure, participants, simulated_sites, split_scope
from fednano.unlearning.start import fila_start, plain_start, site_rows
from fednano.unlearning.workspace import Workspace

OWNER = "client-001"

Unlearn = Callable[..., UnlearnOutcome]


MEASURED: dict[str, Measurement] = {}


@pytest.fixture
def forget(finished: Any, monkeypatch: Any) -> Unlearn:
    """Unlearn the secret; keywords change the request, ``progress`` and ``stop`` go past it.

    Measuring is a function of scope and leaves alone, so each adapter is measured once in all tests together.
    """
    measure = Workspace.measure

    def once(work: Workspace, leaves: dict[str, torch.Tensor]) -> Measurement:
        content = b"".join(leaves[name].numpy().tobytes() for name in sorted(leaves))
        scope = repr((sorted(s.id for s in work.scope.forget), work.perturbed, work.seed)).encode()
        key = hashlib.sha256(scope + content).hexdigest()
        if key not in MEASURED:
            MEASURED[key] = measure(work, leaves)
        return MEASURED[key]

    monkeypatch.setattr(Workspace, "measure", once)

    def call(**changes: Any) -> UnlearnOutcome:
        past = {name: changes.pop(name) for name in ("progress", "stop", "perturbed") if name in changes}
        settings = {
            "run": finished.path,
            "client": OWNER,
            "samples": finished.secret,
            "rank": 2,
            "rounds": 3,
            "steps": 4,
            "batch_size": 8,
            "fisher_samples": 12,
        }
        return unlearn(UnlearnRequest(**{**settings, **changes}), sites=finished.sites, **past)

    return call


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], leaf) for name, leaf in right.items())


def test_loku_forgets_keeps_the_rest_and_touches_nothing(finished: Any, forget: Unlearn) -> None:
    before, seen = digests(finished.path), []
    outcome = forget(progress=seen.append)
    assert digests(finished.path) == before  # the run, its adapter and its checkpoints are only read
    assert outcome.status == "reached"
    first, last = outcome.before, outcome.after
    assert first is not None
    assert last is not None
    assert first.forget.exact_memorisation == 1  # it had been learnt
    assert last.forget.exact_memorisation <= first.unseen.exact_memorisation
    assert last.forget.loss > first.forget.loss + 1
    assert last.forget.ihl < first.forget.ihl - 0.5
    assert last.utility >= 0.9 * first.utility
    assert last.accuracy >= first.accuracy - 0.1
    assert last.retain.exact_memorisation >= first.retain.exact_memorisation - 0.1
    assert last.attacks["loss"].value < first.attacks["loss"].value
    assert set(last.clients) == set(finished.sites)
    assert not outcome.exact
    # The records are those that progress saw, and say why it ended.
    assert seen == outcome.records
    assert [record.round for record in seen] == list(range(1, outcome.best_round + 1))
    assert seen[-1].forgotten
    assert seen[-1].acceptable
    assert seen[-1].ma <= float(outcome.thresholds["ma"] or 0)
    assert outcome.start["fisher"].startswith("exact")
    assert outcome.start["largest_difference"] < 1e-5
    text = json.dumps(outcome.to_json(), allow_nan=False)
    assert "secret" not in text  # neither samples nor their ids
    # The shadow adapter is an adapter of the run's own kind, and differs by the rank-2r pair.
    with Workspace(finished.path, OWNER, finished.secret, sites=finished.sites) as work:
        assert {n: v.shape for n, v in work.leaves.items()} == {n: v.shape for n, v in outcome.leaves.items()}
        for stream, pair in outcome.pairs.items():
            assert pair.A.shape[0] == 2 * 2
            work.edge.load_travelling(work.leaves)
            old = work.edge.layer(stream).delta()
            work.edge.load_travelling(outcome.leaves)
            torch.testing.assert_close(
                old + pair.matrix(), work.edge.layer(stream).delta(), rtol=0, atol=1e-5
            )


def test_same_seed_same_bits_and_the_language_model_is_not_written(
    finished: Any, forget: Unlearn, monkeypatch: Any
) -> None:
    weights: list[str] = []

    def named(work: Workspace) -> None:
        part = work.llm.part
        weights.append(language_fingerprint(part.decoder, part.head))
        assert not any(p.requires_grad or p.grad is not None for p in part.decoder.parameters())

    monkeypatch.setattr(Workspace, "close", named)
    first, second = (forget(rounds=1, steps=1, fisher_samples=2, utility_floor=0.01) for _ in range(2))
    assert first.best_round == 1
    assert same(first.leaves, second.leaves)
    assert not same(first.leaves, RunFolder.open(finished.path).load_adapter()[0])
    assert weights == 2 * [RunFolder.open(finished.path).load_adapter()[1]["language"]]


def test_a_stop_a_floor_and_a_divergence_hand_back_the_run_s_adapter(finished: Any, forget: Unlearn) -> None:
    own, _ = RunFolder.open(finished.path).load_adapter()
    calls: list[RoundRecord] = []
    stopped = forget(method="ihl", progress=calls.append, stop=lambda: True)
    assert (stopped.status, calls) == ("stopped", [])
    costly = forget(method="gradient_ascent", rounds=1, learning_rate=0.3, utility_floor=1.0)
    assert costly.status == "utility floor"
    assert not costly.records[0].acceptable
    huge = forget(method="gradient_ascent", rounds=1, steps=2, learning_rate=1e6)
    assert huge.status == "diverged"
    for outcome in (stopped, costly, huge):
        assert outcome.best_round == 0
        assert same(outcome.leaves, own)
        assert outcome.after == outcome.before


def test_retraining_never_sees_the_samples(finished: Any, forget: Unlearn) -> None:
    other = {name: Perturbed("the door is green", ("red", "it is blue")) for name in finished.secret[:5]}
    outcome = forget(method="retrain", perturbed=other)
    assert outcome.status == "retrained"
    assert outcome.exact
    assert outcome.start == {"from_round": 0, "first_exposure": 1}
    assert outcome.after is not None
    assert outcome.before is not None
    assert outcome.after.forget.exact_memorisation == 0 < outcome.before.forget.exact_memorisation
    assert [record.round for record in outcome.records] == [1, 2, 3]
    # Compared with it, the adapter before unlearning stands out; without a reference nothing is said.
    gap = against_reference(outcome.before, outcome.after)
    assert gap.exact_memorisation_gap == 1
    assert gap.forget_quality is not None
    assert (gap.forget_quality.n, gap.forget_quality.n_reference) == (5, 5)
    assert against_reference(outcome.after, outcome.after).forget_quality == ForgetQuality(1.0, 0.0, 5, 5)
    assert against_reference(outcome.after, outcome.after).priv_leak == 0
    assert against_reference(outcome.after, None) == Comparison()
    # One truth ratio by hand, from the model's own words.
    with Workspace(finished.path, OWNER, finished.secret, sites=finished.sites) as work:
        work.edge.load_travelling(outcome.leaves)
        sample = work.scope.forget[0]
        rows = [replace(sample, answer=text) for text in ("the door is green", "red", "it is blue")]
        right, *wrong = answer_losses(work.edge, work.llm, work.data(rows)).double().tolist()
        p = [math.exp(-loss) for loss in (right, *wrong)]
        assert outcome.after.forget.truth_ratios[0] == pytest.approx(math.sqrt(p[1] * p[2]) / p[0], rel=1e-4)


def test_an_owner_without_retained_samples_compares_row_sums(finished: Any) -> None:
    everything = tuple(sample.id for sample in finished.sites[OWNER].train)
    request = UnlearnRequest(run=finished.path, client=OWNER, samples=everything, fisher_samples=4)
    with Workspace(finished.path, OWNER, everything, sites=finished.sites) as work:
        forget = work.data(work.scope.forget)
        others = {name: work.data(samples) for name, samples in work.scope.retain.items()}
        assert set(others) == {"client-000"}
        start = fila_start(work.edge, work.leaves, site_rows(request, work, forget, others), request.rank)
        assert start.facts["fisher"].startswith("approximation: ratio of row sums")
        plain = plain_start(work.edge, work.leaves)
        assert plain.prepared is None
        assert same(plain.leaves, work.leaves)


def test_a_simulated_run_retrained_with_everything_is_itself(small_vqa: Path, tmp_path: Path) -> None:
    """The oracle of retraining: with nothing to forget it is the run, bit for bit. And when samples were first seen."""
    config = RunConfig(
        dataset=str(small_vqa),
        clients=2,
        alpha=5.0,
        rounds=2,
        samples=8,
        batch_size=4,
        rank=2,
        rule="fisher",
        fisher_samples=2,
        holdout=0.1,
        evaluate_every=0,
        evaluate_samples=4,
        final_samples=4,
        placement="local",
        runs_dir=str(tmp_path / "runs"),
        cache_dir=str(tmp_path / "cache"),
    )
    folder = RunFolder.open(simulate(config, backend="inprocess", view=make_view("quiet")))
    config = config_of(folder)
    sites = simulated_sites(folder, config)
    name, site = next((name, site) for name, site in sites.items() if len(site.train) > 17)
    with Workspace(folder.path, name, [site.train[0].id]) as work:
        everybody = {client: work.data(own.train) for client, own in work.sites.items()}
        rounds, start = participants(folder), (0, dict(work.untuned), {})
        assert rounds == {1: sorted(sites), 2: sorted(sites)}
        *_, last = retrain(work.config, work.edge, work.llm, everybody, rounds, start, stop=lambda: False)
        assert same(last.leaves, work.leaves)
    exposed = [first_exposure(folder, config, site, name, [sample]) for sample in site.train]
    assert (exposed.count(1), exposed.count(2)) == (8, 8)
    late, early = site.train[exposed.index(2)], site.train[exposed.index(1)]
    assert first_exposure(folder, config, site, name, [late, early]) == 1
    done, leaves, memory = starting_point(folder, 2, {})
    saved = folder.load_checkpoint(1).tensors
    assert done == 1
    assert same(leaves, {n.removeprefix("leaf."): v for n, v in saved.items() if n.startswith("leaf.")})
    assert len(leaves) + len(memory) == len(saved)
    fresh = {"a": torch.ones(1)}
    assert starting_point(folder, 1, fresh)[:2] == (0, fresh)
    # A sample that no round drew, and one that was held out, need no unlearning; the job says so and does nothing.
    untrained = [site.train[exposed.index(None)].id, site.held_out[0].id]
    outcome = unlearn(UnlearnRequest(run=folder.path, client=name, samples=tuple(untrained)))
    assert outcome.status == "never trained on"
    assert outcome.ignored == (site.held_out[0].id,)
    assert same(outcome.leaves, folder.load_adapter()[0])


def test_scopes_that_make_no_sense_are_refused(finished: Any, forget: Unlearn) -> None:
    with pytest.raises(DataError, match="no site 'client-9'"):
        forget(client="client-9")
    with pytest.raises(DataError, match="the forget set is empty"):
        forget(samples=())
    with pytest.raises(DataError, match=r"1 of 1 sample ids are not client-001's.*An id looks like"):
        forget(samples=("nobody/1",))
    alone = {OWNER: finished.sites[OWNER]}
    with pytest.raises(DataError, match="nothing would be retained"):
        split_scope(alone, OWNER, [sample.id for sample in finished.sites[OWNER].train])


def test_runs_that_do_not_fit_are_refused(finished: Any, tmp_path: Path) -> None:
    source = RunFolder.open(finished.path)
    leaves, info = source.load_adapter()
    for change, message in (
        ({"edge": "0" * 64}, "tuned another model"),
        ({"language": "0" * 64}, "another language model"),
    ):
        other = RunFolder.create(tmp_path, "other", config_of(source).to_mapping())
        other.write_json("partition.json", {"kind": "sites"})
        other.save_adapter(leaves, {**info, **change})
        with pytest.raises(RunError, match=message):
            Workspace(other.path, OWNER, finished.secret, sites=finished.sites)
    with pytest.raises(RunError, match="real sites"):
        Workspace(other.path, OWNER, finished.secret)
    other.save_adapter({**leaves, "beside/text.down": torch.zeros(1, 1)}, info)
    with pytest.raises(ConfigError, match="more than its adapter"):
        Workspace(other.path, OWNER, finished.secret, sites=finished.sites)


def test_after_an_earlier_job_retraining_starts_from_scratch(small_vqa: Path, tmp_path: Path) -> None:
    """A checkpoint between may hold what the earlier job forgot, and its sites drew from more samples."""
    config = RunConfig(dataset=str(small_vqa), clients=2, alpha=5.0, samples=4, runs_dir=str(tmp_path))
    folder = RunFolder.create(tmp_path, "run", config.to_mapping())
    folder.write_json("partition.json", {"kind": "dirichlet"})
    for number, name in ((1, "client-000"), (2, "client-001")):
        folder.append_metrics(
            {
                "phase": "federated",
                "round": number,
                "scope": "client",
                "client": name,
                "loss": 1.0,
                "samples": 4,
            }
        )
    sites = simulated_sites(folder, config)
    forgotten, later = sites["client-000"].train[0], sites["client-001"].train
    assert first_exposure(folder, config, sites["client-001"], "client-001", later) == 2
    salt = "00" * 32
    gone = Tombstone("job", "client-000", salt, frozenset({sample_hash(salt, forgotten.id)}))
    write_tombstones(folder.path, Tombstones(1, (gone,)))
    assert forgotten.id not in {s.id for s in simulated_sites(folder, config)["client-000"].train}
    assert first_exposure(folder, config, sites["client-001"], "client-001", later) == 1


def test_requests_out_of_range_are_refused() -> None:
    for change, message in (
        ({"method": "magic"}, "unknown unlearning method 'magic'; there are: loku"),
        ({"rounds": 0}, "rounds is 0"),
        ({"utility_floor": 0.0}, "utility_floor is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            UnlearnRequest(run="latest", client="a", samples=("b",), **change)
