"""A site's part in a live job: everything that touches its samples is done here, and only figures and adapters leave.

The site finds the samples by the salted hashes of its own signed request. With ``key`` in its SuperNode's configuration
(the path of its private key) it does nothing that this key has not signed, and signs the figures it measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fednano.data import Sample, load_dataset
from fednano.errors import ConfigError, DataError, RequestRefused
from fednano.federation.messages import Instruction, Reply
from fednano.federation.model import load_data
from fednano.federation.schedules import fit_rank
from fednano.federation.worker import Worker, site_name
from fednano.models.language import LanguageModel
from fednano.runs.checkpoints import pack
from fednano.runs.tombstones import sample_hash
from fednano.security.canonical import canonical, sha256_hex
from fednano.security.keys import Signer, load_signer
from fednano.training.data import ClientData
from fednano.unlearning.fisher import row_weights
from fednano.unlearning.jobs.receipt import available
from fednano.unlearning.jobs.request import signed_by
from fednano.unlearning.live.ask import Ask, Forget
from fednano.unlearning.local import Reference, reference_of, refusals, steps
from fednano.unlearning.measure import mean_probability, measure_site, score_set
from fednano.unlearning.methods import get_method
from fednano.unlearning.parties import looks_back
from fednano.unlearning.sites import first_rounds, some
from fednano.unlearning.start import fisher_of

__all__ = ["STATEMENT", "asked"]

STATEMENT = "unlearning statement"
"""What a site's signature under its figures is for."""


def asked(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Do what a live job asks of this client.

    Raises:
        RequestRefused: the site's own key has not signed what it is to forget.
        DataError: nothing fits the request.
    """
    ask = Ask.from_advice(instruction.advice)
    site = _Site(instruction, node, ask)
    return _TASKS[ask.task](site)


@dataclass(frozen=True)
class _Parts:
    """The site's samples as the job divides them.

    Attributes:
        forget: named by the requests, and trained on.
        first: the first round that trained on one of them.
        retain: training samples that no request names.
        held: held-out samples that no request names.
        ignored: how many were named that no round has trained on.
    """

    forget: list[Sample]
    first: int | None
    retain: list[Sample]
    held: list[Sample]
    ignored: int


class _Site:
    """One request, with what this process has loaded for it."""

    def __init__(self, instruction: Instruction, node: Mapping[str, Any], ask: Ask) -> None:
        self.instruction, self.node, self.ask = instruction, node, ask
        self.name = site_name(node)
        self.worker = Worker.get(instruction.config)
        self.worker.require_basis(instruction.basis)
        self.share = self.worker.share(self.name, node, pool=False)
        self.load(instruction.leaves)

    def load(self, leaves: Mapping[str, Tensor]) -> None:
        fit_rank(self.worker.edge, dict(leaves))
        self.worker.edge.load_travelling(leaves)

    @cached_property
    def llm(self) -> LanguageModel:
        return self.worker.llm(self.instruction.ticket)

    @cached_property
    def signer(self) -> Signer | None:
        path = str(self.node.get("key", ""))
        return load_signer(Path(path)) if path else None

    @cached_property
    def parts(self) -> _Parts:
        train, held = list(self.share.data.samples), list(self.share.held_out)
        forget = self.ask.forget
        if forget is None:
            return _Parts([], None, train, held, 0)
        self._check(forget)
        salt = self.signer.salt if self.signer is not None else forget.salt
        wanted = {s.id for s in (*train, *held) if sample_hash(salt, s.id) in forget.hashes}
        if len(wanted) < len(forget.hashes):
            raise DataError(
                f"{len(forget.hashes) - len(wanted)} of {len(forget.hashes)} samples that the requests name are not "
                f"{self.name}'s, or are forgotten already."
            )
        first = first_rounds(self.instruction.config, train, self.name, forget.rounds, forget.epoch)
        gone = [s for s in train if s.id in wanted and s.id in first]
        return _Parts(
            gone,
            min((first[s.id] for s in gone), default=None),
            [s for s in train if s.id not in wanted],
            [s for s in held if s.id not in wanted],
            len(wanted) - len(gone),
        )

    def _check(self, forget: Forget) -> None:
        """What this site is to forget, it has signed itself."""
        if self.signer is None:
            return
        for envelope in forget.requests:
            if not signed_by(envelope, self.signer.public) or envelope["request"]["site"] != self.name:
                raise RequestRefused(
                    f"{self.name} is asked to forget what its own key has not signed. Nothing is done."
                )

    def data(self, samples: list[Sample]) -> ClientData | None:
        return ClientData(samples, self.worker.edge, self.worker.features) if samples else None

    @property
    def forget(self) -> ClientData | None:
        return self.data(self.parts.forget)

    def taken(self, prefix: str) -> dict[str, Tensor]:
        extra = self.instruction.extra
        return {n.removeprefix(prefix): v for n, v in extra.items() if n.startswith(prefix)}

    def reply(
        self,
        metrics: dict[str, float],
        facts: dict[str, str] | None = None,
        leaves: dict[str, Tensor] | None = None,
    ) -> Reply:
        return Reply(self.name, self.instruction.round, metrics, facts or {}, leaves)


def _scope(site: _Site) -> Reply:
    parts = site.parts
    return site.reply(
        {
            "forget": len(parts.forget),
            "first": parts.first or 0,
            "retain": len(parts.retain),
            "ignored": parts.ignored,
        }
    )


def _fisher(site: _Site) -> Reply:
    """FILA: the owner's row weights, or row sums where it keeps nothing to compare with; others' row sums."""
    ask, edge = site.ask, site.worker.edge
    with _Clock() as clock:
        retain = site.data(site.parts.retain)
        theirs = None
        if retain is not None:
            theirs = fisher_of(ask.seed, ask.fisher_samples, edge, site.llm, retain, site.name, end=True)
        forget = site.forget
        if forget is None:
            assert theirs is not None
            rows = {stream: value.sum(dim=1) for stream, value in theirs.items()}
        else:
            mine = fisher_of(ask.seed, ask.fisher_samples, edge, site.llm, forget, site.name, end=False)
            rows = {
                stream: value.sum(dim=1) if theirs is None else row_weights(value, theirs[stream])
                for stream, value in mine.items()
            }
    return site.reply({"seconds": clock.seconds, "sums": float(theirs is None)}, leaves=rows)


def _train(site: _Site) -> Reply:
    ask, worker = site.ask, site.worker
    forget, method, reference, refusal = site.forget, None, None, None
    if ask.forget is not None and forget is not None:
        method = get_method(ask.forget.method)
        if looks_back(method):
            reference, refusal = _looking_back(site, forget)
    result = steps(
        worker.edge,
        site.llm,
        ask.settings,
        retain=site.data(site.parts.retain),
        moving={name: value.bool() for name, value in site.taken("moving/").items()},
        seed=ask.seed,
        client=site.name,
        round_number=site.instruction.round,
        method=method,
        forget=forget if method is not None else None,
        refusal=refusal,
        reference=reference,
    )
    known = {"forget": result.forget_loss, "retain": result.retain_loss}
    metrics: dict[str, float] = {name: value for name, value in known.items() if value is not None}
    metrics |= {"samples": result.samples, "steps": result.steps, "seconds": result.seconds}
    facts = {"spec": worker.edge.spec(), "basis": worker.edge.basis_fingerprint()}
    return site.reply(metrics, facts, worker.edge.travelling())


def _looking_back(site: _Site, forget: ClientData) -> tuple[Reference, ClientData]:
    """The model before, for losses that look back at it; a process may live for one message only, so it is anew."""
    edge = site.worker.edge
    site.load(site.taken("origin/"))
    refusal = refusals(forget, edge, site.worker.features)
    reference = reference_of(edge, site.llm, forget, refusal)
    site.load(site.instruction.leaves)
    return reference, refusal


def _probe(site: _Site) -> Reply:
    forget = site.forget
    if forget is None:
        raise DataError(f"{site.name} has nothing to forget.")
    scores = score_set(site.worker.edge, site.llm, forget)
    return site.reply({}, {"figures": json.dumps(vars(scores))})


def _measure(site: _Site) -> Reply:
    """The owner: all figures of the forget set. Everybody: the answer probability on what it held out."""
    worker, parts, ask = site.worker, site.parts, site.ask
    metrics: dict[str, float] = {}
    own = some(parts.held, ask.seed, site.name)
    if own:
        data = site.data(own)
        assert data is not None
        metrics["held-out"] = mean_probability(worker.edge, site.llm, data)
    forget = site.forget
    if forget is None:
        return site.reply(metrics)
    unseen = some([*parts.held, *_tests(site)], ask.seed, "unseen", most=max(32, len(forget)), shuffle=False)
    sets = {
        "forget": forget,
        "retain": site.data(some(parts.retain, ask.seed, "retain")),
        "unseen": site.data(unseen),
    }
    if sets["unseen"] is None:
        raise DataError("there are no samples that the run never trained on; the stop rule needs some.")
    found = measure_site(
        worker.edge,
        site.llm,
        worker.features,
        {name: data for name, data in sets.items() if data is not None},
        leaves=site.instruction.leaves,
        untuned=worker.start,
        seed=ask.seed,
    )
    facts = {"figures": json.dumps(found.to_json())}
    if ask.sign and site.signer is not None and ask.forget is not None:
        facts["statement"] = _statement(site.signer, site, ask.forget, found.to_json())
    return site.reply({**metrics, "ignored": parts.ignored}, facts)


def _statement(signer: Signer, site: _Site, forget: Forget, figures: dict[str, Any]) -> str:
    body = {
        "adapter": sha256_hex(pack(site.instruction.leaves)),
        "figures": available({name: figures[name] for name in ("forget", "retain", "unseen", "attacks")}),
        "requests": sorted(sha256_hex(canonical(envelope["request"])) for envelope in forget.requests),
        "site": site.name,
    }
    signed = {
        "public_key": signer.public,
        "signature": signer.sign(STATEMENT, canonical(body)),
        "statement": body,
    }
    return json.dumps(signed)


def _tests(site: _Site) -> list[Sample]:
    """The test questions that this site can read: its own, or in a simulation those of the data set."""
    config, where = site.instruction.config, str(site.node.get("data", ""))
    try:
        tests = load_dataset(where, "test") if where else load_data(config, "test")
        return some(list(tests), site.ask.seed, "test")
    except (DataError, ConfigError):
        return []


class _Clock:
    def __enter__(self) -> _Clock:
        import time

        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        import time

        self.seconds = time.perf_counter() - self._began


_TASKS: dict[str, Callable[[_Site], Reply]] = {
    "scope": _scope,
    "fisher": _fisher,
    "train": _train,
    "probe": torch.no_grad()(_probe),
    "measure": torch.no_grad()(_measure),
}
