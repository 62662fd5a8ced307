"""Commit a verified batch, or roll a committed one back: receipts, log, tombstones and adapter in one exchange."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fednano import __version__
from fednano.errors import JobStateError
from fednano.runs.tombstones import Tombstone, Tombstones, read_tombstones
from fednano.security.canonical import canonical, sha256_hex
from fednano.security.keys import Signer
from fednano.unlearning.jobs.desk import Desk
from fednano.unlearning.jobs.exchange import Exchange, carry_out, finish_pending
from fednano.unlearning.jobs.job import Job, now, parse_time, timestamp
from fednano.unlearning.jobs.purge import restore
from fednano.unlearning.jobs.receipt import LIMITS, NOT_AVAILABLE, available, check_discreet, sign_receipt
from fednano.unlearning.jobs.request import Plan, scope_hash
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.store import only_worker

__all__ = ["commit", "roll_back"]


def commit(
    desk: Desk, batch: Sequence[Job], outcome: Mapping[str, Any], signer: Signer, *, secrets: Iterable[str]
) -> None:
    """Commit a batch whose outcome was accepted.

    Args:
        desk: the run's desk.
        batch: its jobs, in state ``verifying``; before and after are staged.
        outcome: what the runner reported.
        signer: the server's key.
        secrets: sample ids, none of which may stand in a receipt.

    Raises:
        RunError: the disk is full. Before the promise nothing has changed; after it the next worker finishes it.
    """
    place = desk.place
    _, _, model = place.adapter()
    after = sha256_hex((place.staging(batch[0].batch) / "after.safetensors").read_bytes())
    tombstones = _grown(desk, batch, outcome)
    index, previous = place.ledger.head()
    lines, receipts = [], {}
    for job in batch:
        body = _body(desk, job, batch, outcome, model, after, tombstones.epoch)
        body["log"] = {"index": index, "previous": previous}
        content = sign_receipt(signer, body)
        check_discreet(content, secrets)
        line = place.ledger.about(signer, "receipt", job.id, content, index=index, previous=previous)
        lines.append(line.decode())
        receipts[job.id] = content.decode()
        index, previous = index + 1, sha256_hex(line)
    carry_out(
        place,
        Exchange(
            batch=batch[0].batch,
            target=State.COMMITTED.value,
            jobs=[job.id for job in batch],
            before=outcome["base"],
            after=after,
            staged="after",
            tombstones=tombstones.to_json(),
            lines=lines,
            receipts=receipts,
            facts={
                "adapter_before": outcome["base"],
                "adapter_after": after,
                "epoch": tombstones.epoch,
                "committed": timestamp(),
                "probes": dict(outcome.get("probes") or {}),
                "figures": {k: outcome.get(k) for k in ("before", "after", "reference", "thresholds")},
                **{k: v for k, v in outcome.get("facts", {}).items() if k not in batch[0].facts},
            },
            actor="worker",
            note="",
        ),
    )


def roll_back(desk: Desk, identity: str, signer: Signer, *, actor: str, reason: str) -> list[Job]:
    """Put the adapter of before a job back, and take its tombstones away.

    Jobs that were worked on together go back together.

    Raises:
        JobStateError: the job is not committed, its copies are purged, or the adapter was changed since.
    """
    place, store = desk.place, desk.store
    with only_worker(place.lock):
        finish_pending(place)
        job = store.job(identity)
        if job.state is not State.COMMITTED:
            raise JobStateError(
                f"job {identity} is {job.state.value}; only a committed job can be rolled back."
            )
        batch = [each for each in store.jobs(State.COMMITTED) if each.batch == job.batch]
        ids = [each.id for each in batch]
        kept = place.staging(job.batch) / "before.safetensors"
        if any(each.facts.get("purge", {}).get("mode") == "delete" for each in batch) or not kept.is_file():
            raise JobStateError(f"job {identity} is purged: the adapter of before no longer exists.")
        current = place.adapter()[0]
        if current != job.facts["adapter_after"]:
            raise JobStateError(
                f"the adapter has changed since job {identity} was committed (now {current[:16]}..., then "
                f"{job.facts['adapter_after'][:16]}...); only the newest change can be rolled back."
            )
        old = read_tombstones(place.folder.path)
        tombstones = Tombstones(old.epoch + 1, tuple(each for each in old.sets if each.job not in ids))
        statement = canonical(
            {
                "actor": actor,
                "adapter_after": job.facts["adapter_before"],
                "adapter_before": current,
                "jobs": ids,
                "kind": "rollback",
                "reason_sha256": sha256_hex(reason.encode()),
                "tombstones_epoch": tombstones.epoch,
            }
        )
        index, previous = place.ledger.head()
        line = place.ledger.about(signer, "rollback", job.batch, statement, index=index, previous=previous)
        for each in batch:
            restore(place, each.id)
        carry_out(
            place,
            Exchange(
                batch=job.batch,
                target=State.ROLLED_BACK.value,
                jobs=ids,
                before=current,
                after=job.facts["adapter_before"],
                staged="before",
                tombstones=tombstones.to_json(),
                lines=[line.decode()],
                receipts={},
                facts={"rolled_back": timestamp(), "rollback": statement.decode()},
                actor=actor,
                note=reason,
            ),
        )
        return [store.job(each) for each in ids]


def _level(outcome: Mapping[str, Any]) -> float | None:
    """What a later probe of the forgotten set is compared with."""
    known = (
        outcome["after"].get("forget", {}).get("exact_memorisation"),
        outcome["before"].get("unseen", {}).get("exact_memorisation"),
    )
    found = [float(each) for each in known if isinstance(each, int | float)]
    return max(found) if len(found) == len(known) else None


def _grown(desk: Desk, batch: Sequence[Job], outcome: Mapping[str, Any]) -> Tombstones:
    level = _level(outcome)
    old, registry = read_tombstones(desk.place.folder.path), desk.place.registry
    new = tuple(
        Tombstone(job.id, job.site, registry.site(job.site).salt, frozenset(job.request["ids"]), level)
        for job in batch
    )
    return Tombstones(old.epoch + 1, old.sets + new)


def _body(
    desk: Desk,
    job: Job,
    batch: Sequence[Job],
    outcome: Mapping[str, Any],
    model: Mapping[str, Any],
    after: str,
    epoch: int,
) -> dict[str, Any]:
    """What a receipt says. Whatever is not known says so."""
    request, deadline = job.request, job.request["deadline"]
    return {
        "version": 1,
        "software": f"fednano {__version__}",
        "run": desk.place.folder.id,
        "job": job.id,
        "site": job.site,
        "verdict": "committed",
        "request_sha256": sha256_hex(canonical(request)),
        "scope": {
            "kind": request["kind"],
            "sha256": scope_hash(request),
            "samples": len(request["ids"]),
            "trained_on": _known(job, outcome, "trained"),
            "first_round": _known(job, outcome, "first_exposure"),
            "ownership": job.facts.get("ownership", NOT_AVAILABLE),
        },
        "method": {name: request[name] for name in vars(Plan())},
        "worked_on_together_with": [other.id for other in batch if other.id != job.id],
        "forget_set_of_the_batch": outcome["samples"],
        "model": {
            name: str(model.get(name) or NOT_AVAILABLE) for name in ("edge", "language", "spec", "basis")
        },
        "adapter": {"before": outcome["base"], "after": after},
        "metrics": {
            "before": available(outcome["before"]),
            "after": available(outcome["after"]),
            "reference": available(outcome["reference"]),
        },
        "reference": outcome["reference_kind"] or NOT_AVAILABLE,
        "thresholds": available(outcome["thresholds"]),
        "cost": {name: outcome[name] for name in ("seconds", "client_seconds", "bytes")},
        "rounds": outcome["rounds"],
        "stopped": outcome["stopped"],
        "probes": available(outcome.get("probes")),
        "earlier_forget_sets": available(outcome.get("earlier")),
        "site_statement": outcome.get("statement") or NOT_AVAILABLE,
        "approximations": list(outcome["approximations"]),
        "approvals": sorted(each["public"] for each in desk.valid_approvals(job)),
        "tombstones_epoch": epoch,
        "submitted": job.created,
        "committed": timestamp(),
        "deadline": deadline or NOT_AVAILABLE,
        "deadline_met": parse_time(deadline) >= now() if deadline else NOT_AVAILABLE,
        "limits": list(LIMITS),
    }


def _known(job: Job, outcome: Mapping[str, Any], name: str) -> Any:
    """A fact about the scope: from the request's judgement, else from the owner itself."""
    found = job.facts.get(name, outcome.get("facts", {}).get(name))
    return NOT_AVAILABLE if found is None else found
