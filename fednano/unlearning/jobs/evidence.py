"""Evidence about a committed job: probes made after its receipt was signed, in signed files that the log names.

The receipt stays as it is. ``receipts/<job>.probes-<n>.json`` is the canonical form of ``{"evidence", "public_key",
"signature"}``; line ``n`` of the log holds its hash, as it holds those of receipts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fednano.errors import DataError, JobStateError, ReceiptInvalid
from fednano.runs import RunFolder
from fednano.runs.tombstones import Tombstones, read_tombstones
from fednano.security.canonical import canonical, parse_canonical, sha256_hex
from fednano.security.keys import Signer, valid_signature
from fednano.unlearning.jobs.job import Job, timestamp
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.receipt import available
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.store import only_worker

__all__ = ["add_evidence", "probe_committed", "verify_evidence"]

_PURPOSE = "unlearning evidence"


def probe_committed(
    place: Place,
    job: Job,
    names: tuple[str, ...],
    *,
    data: Mapping[str, Path],
    paraphrases: Mapping[str, tuple[str, ...]],
) -> dict[str, Any]:
    """Probe the run's adapter for what a committed job forgot.

    Args:
        place: the run's job files.
        job: the job.
        names: of `fednano.unlearning.probes.PROBES`.
        data: real site to its own data folder; every site's is needed then.
        paraphrases: sample id to its question in other words.

    Raises:
        JobStateError: the job is not committed, or its level is not known.
        DataError: the owner has deleted the samples.
        RunError: they are with real sites, and ``data`` does not name them.
    """
    from fednano.federation.server import config_of
    from fednano.unlearning.probes import probe_all
    from fednano.unlearning.sites import all_sites
    from fednano.unlearning.workspace import Workspace

    if job.state is not State.COMMITTED:
        raise JobStateError(f"job {job.id} is {job.state.value}; probes are made of a committed job.")
    folder = RunFolder(place.folder.path)
    known = read_tombstones(folder.path)
    own = [each for each in known.sets if each.job == job.id]
    if not own or own[0].level is None:
        raise JobStateError(
            f"job {job.id} was committed without the level that probes are compared with; submit it again."
        )
    others = Tombstones(known.epoch, tuple(each for each in known.sets if each.job != job.id))
    sites = all_sites(folder, config_of(folder), data, others)
    holder = sites.get(job.site)
    held = [] if holder is None else list(holder.train)
    left = {sample.id for sample in Tombstones(1, tuple(own)).keep(held)}
    ids = [sample.id for sample in held if sample.id not in left]
    if not ids:
        raise DataError(
            f"{job.site} holds none of the samples of job {job.id} any more (or --data does not name its folder), so "
            "there is nothing to probe with."
        )
    with Workspace(folder.path, job.site, ids, runs_dir=folder.path.parent, sites=sites) as work:
        return probe_all(work, work.leaves, names, level=own[0].level, paraphrases=paraphrases)


def add_evidence(place: Place, job: Job, probes: Mapping[str, Any], signer: Signer) -> Path:
    """Sign what probes found, put it beside the receipt and into the log, and keep it with the job.

    Raises:
        JobStateError: a worker is at it.
        RunError: the disk is full.
    """
    from fednano.runs.atomic import write_bytes

    with only_worker(place.lock):
        index, previous = place.ledger.head()
        body = {
            "adapter": place.adapter()[0],
            "job": job.id,
            "log": {"index": index, "previous": previous},
            "probes": available(probes),
            "receipt_sha256": sha256_hex(place.receipt(job.id).read_bytes()),
            "run": place.folder.id,
            "time": timestamp(),
        }
        signed = {
            "evidence": body,
            "public_key": signer.public,
            "signature": signer.sign(_PURPOSE, canonical(body)),
        }
        content = canonical(signed) + b"\n"
        path = place.root / "receipts" / f"{job.id}.probes-{index}.json"
        write_bytes(path, content)
        place.ledger.append(
            place.ledger.about(signer, "probes", job.id, content, index=index, previous=previous)
        )
        merged = {**job.facts.get("probes", {}), **probes}
        place.store.add_facts(
            job.id, {"probes": merged, "evidence": [*job.facts.get("evidence", []), path.name]}
        )
    return path


def verify_evidence(content: bytes, public: str) -> dict[str, Any]:
    """Check an evidence file offline.

    Raises:
        ReceiptInvalid: it was changed, or another key signed it.
    """
    try:
        signed = parse_canonical(content.removesuffix(b"\n"))
    except ValueError as error:
        raise ReceiptInvalid(f"the evidence was changed, or is none: {error}.") from error
    if not isinstance(signed, dict) or set(signed) != {"evidence", "public_key", "signature"}:
        raise ReceiptInvalid("expected an object with evidence, public_key and signature.")
    body = signed["evidence"]
    good = signed["public_key"] == public and isinstance(body, dict)
    if not good or not valid_signature(public, _PURPOSE, canonical(body), str(signed["signature"])):
        raise ReceiptInvalid(
            "the signature of the evidence does not fit: it was changed, or another key signed it."
        )
    found: dict[str, Any] = body
    return found
