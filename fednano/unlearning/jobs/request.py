"""A request to forget: what a site signs. Ids and names in it are hashed with the site's salt.

The envelope is ``{"public_key", "request", "signature"}``; the signature (Ed25519) covers the canonical form (RFC 8785)
of the request. A nonce and two times keep an old request from being played again.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from fednano.errors import RequestRefused
from fednano.security.canonical import canonical, sha256_hex
from fednano.security.keys import Signer, salted_hash, valid_signature
from fednano.unlearning.jobs.job import now, parse_time, timestamp
from fednano.unlearning.jobs.registry import Registry

__all__ = ["KINDS", "Plan", "authenticate", "request_key", "scope_hash", "sign_request", "signed_by"]

KINDS = ("samples", "subject", "class", "client")
"""Kinds of scope."""

_PURPOSE = "unlearning request"
_LONGEST = timedelta(days=7)
_SKEW = timedelta(minutes=5)
_TEXTS = ("run", "site", "kind", "label", "method", "reason", "deadline", "issued", "expires", "nonce")
_HASH = re.compile(r"[0-9a-f]{64}")
_NUMBERS = ("rank", "rounds", "steps", "seed")


@dataclass(frozen=True)
class Plan:
    """How to unlearn.

    Attributes:
        method: name of the method, such as ``"loku"``.
        rank: rank of the job's low-rank pair.
        rounds: most rounds.
        steps: most steps a round.
        seed: same seed, same bits.
        utility_floor: smallest part of the utility before that must remain, in (0, 1].
    """

    method: str = "loku"
    rank: int = 4
    rounds: int = 5
    steps: int = 20
    seed: int = 0
    utility_floor: float = 0.9


def sign_request(
    signer: Signer,
    *,
    run: str,
    kind: str,
    name: str,
    ids: Iterable[str],
    plan: Plan,
    reason: str,
    deadline: str = "",
    lifetime: timedelta = timedelta(hours=24),
    moment: datetime | None = None,
) -> dict[str, Any]:
    """Make and sign a request.

    Args:
        signer: the site.
        run: id of the run.
        kind: one of :data:`KINDS`.
        name: the subject or class; empty for the other kinds.
        ids: sample ids in clear text; only their hashes go into the request.
        plan: how to unlearn.
        reason: for people, such as ``"GDPR Art. 17"``. It stays in the server's job list and is hashed in the receipt.
        deadline: ISO 8601 time or date until which the job is to be done; empty for none.
        lifetime: how long the request may be handed in.
        moment: time of signing; the present by default.
    """
    issued = moment or now()
    salt = signer.salt
    request = {
        "version": 1,
        "run": run,
        "site": signer.name,
        "kind": kind,
        "label": salted_hash(salt, kind, name) if name else "",
        "ids": sorted({salted_hash(salt, "sample", each) for each in ids}),
        **vars(plan),
        "utility_floor": float(plan.utility_floor),
        "reason": reason,
        "deadline": timestamp(parse_time(deadline)) if deadline else "",
        "issued": timestamp(issued),
        "expires": timestamp(issued + lifetime),
        "nonce": os.urandom(16).hex(),
    }
    signature = signer.sign(_PURPOSE, canonical(request))
    return {"public_key": signer.public, "request": request, "signature": signature}


def signed_by(envelope: object, public: str) -> bool:
    """Whether a key has signed a request, whatever its age; content from outside may be anything."""
    try:
        checked = _shape(envelope)
    except RequestRefused:
        return False
    signature = checked["signature"]
    return bool(signature) and valid_signature(public, _PURPOSE, canonical(checked["request"]), signature)


def scope_hash(request: Mapping[str, Any]) -> str:
    """One hash for what is to be forgotten: SHA-256 over kind, label and ids, all of which are salted."""
    return sha256_hex(canonical([request["site"], request["kind"], request["label"], request["ids"]]))


def request_key(request: Mapping[str, Any]) -> str:
    """What makes two requests one request: the same site asks the same thing of the same run in the same way."""
    plan = [request[name] for name in sorted(vars(Plan()))]
    return sha256_hex(canonical([request["run"], scope_hash(request), plan]))


def authenticate(
    envelope: object, registry: Registry, *, run: str, moment: datetime | None = None
) -> dict[str, Any]:
    """Check form, signature, times and addressee of a request.

    Args:
        envelope: what came in.
        registry: the keys that are believed.
        run: the run that it must be meant for.
        moment: the present, for tests.

    Returns:
        The envelope.

    Raises:
        RequestRefused: what is wrong, and with which part.
    """
    checked = _shape(envelope)
    request = checked["request"]
    if not checked["signature"]:
        raise RequestRefused(
            "the request is not signed. Sign it with the site's key: fednano unlearn submit --key FILE"
        )
    site = registry.site(request["site"])
    if checked["public_key"] != site.public:
        raise RequestRefused(
            f"the request is signed with the key {checked['public_key'][:16]}..., but site {request['site']!r} is "
            f"registered with {site.public[:16]}.... Sign it with the site's own key."
        )
    if not valid_signature(site.public, _PURPOSE, canonical(request), checked["signature"]):
        raise RequestRefused(
            "the signature does not fit the request: it was changed, or signed with another key."
        )
    if request["run"] != run:
        raise RequestRefused(f"the request is meant for run {request['run']!r}, this is {run!r}.")
    present, issued, expires = moment or now(), parse_time(request["issued"]), parse_time(request["expires"])
    if issued > present + _SKEW:
        raise RequestRefused(
            f"the request was issued at {request['issued']}, which lies ahead. Compare the clocks."
        )
    if present > expires:
        raise RequestRefused(f"the request expired at {request['expires']}. Sign a new one.")
    if expires - issued > _LONGEST:
        raise RequestRefused(
            f"the request is valid for {expires - issued}; at most {_LONGEST.days} days are accepted."
        )
    return checked


def _shape(envelope: object) -> dict[str, Any]:
    """Every field there, of its type and in its range; nothing else. The content comes from outside."""
    if not isinstance(envelope, dict) or set(envelope) - {"signature"} != {"public_key", "request"}:
        raise RequestRefused("expected an object with public_key, request and signature.")
    request, signature = envelope["request"], envelope.get("signature", "")
    if not isinstance(request, dict) or not isinstance(signature, str):
        raise RequestRefused("expected the request as an object and the signature as text.")
    wanted = {"version", "ids", "utility_floor", *_TEXTS, *_NUMBERS}
    if set(request) != wanted:
        raise RequestRefused(
            f"the request has the wrong fields: missing {sorted(wanted - set(request))}, unknown "
            f"{sorted(map(str, set(request) - wanted))[:5]}."
        )
    if type(request["version"]) is not int or request["version"] != 1:
        raise RequestRefused(f"the request has version {request['version']!r}; this program reads version 1.")
    _check_values(request)
    _check_scope(request)
    try:
        canonical(request)
    except ValueError as error:
        raise RequestRefused(f"the request cannot be written canonically: {error}.") from error
    return {"public_key": str(envelope["public_key"]), "request": request, "signature": signature}


def _check_values(request: Mapping[str, Any]) -> None:
    for name in _TEXTS:
        if not isinstance(request[name], str) or len(request[name]) > 2000:
            raise RequestRefused(f"{name} must be text of at most 2000 characters.")
    for name in _NUMBERS:
        least = 0 if name == "seed" else 1
        if type(request[name]) is not int or not least <= request[name] <= 1_000_000:
            raise RequestRefused(
                f"{name} is {request[name]!r}; expected a whole number from {least} to 1000000."
            )
    floor = request["utility_floor"]
    if type(floor) not in (float, int) or not (math.isfinite(floor) and 0 < floor <= 1):
        raise RequestRefused(f"utility_floor is {floor!r}; expected a number above 0 and at most 1.")
    if not re.fullmatch(r"[0-9a-f]{32}", request["nonce"]):
        raise RequestRefused("nonce must be 32 hexadecimal characters.")
    for name in ("issued", "expires", *(["deadline"] if request["deadline"] else [])):
        try:
            parse_time(request[name])
        except ValueError as error:
            raise RequestRefused(f"{name} is {request[name]!r}; expected an ISO 8601 time in UTC.") from error


def _check_scope(request: Mapping[str, Any]) -> None:
    if request["kind"] not in KINDS:
        raise RequestRefused(f"scope {request['kind']!r} is unknown; expected one of {', '.join(KINDS)}.")
    ids = request["ids"]
    if not isinstance(ids, list) or not all(isinstance(each, str) and _HASH.fullmatch(each) for each in ids):
        raise RequestRefused("ids must be a list of salted hashes, 64 hexadecimal characters each.")
    if not ids:
        raise RequestRefused("the request names no samples. Name at least one.")
    if ids != sorted(set(ids)):
        raise RequestRefused("ids must be sorted, each once.")
    if (request["kind"] in ("subject", "class")) != bool(_HASH.fullmatch(request["label"])):
        raise RequestRefused("scopes 'subject' and 'class' carry the salted hash of a name, the others none.")
