"""Receipts: what was done for a request, signed by the server. They hold hashes and figures, never data.

A receipt file is the canonical form (RFC 8785) of ``{"public_key", "receipt", "signature"}`` and a newline, so that no
byte of it can change unnoticed. It can be checked offline with the server's public key alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fednano.errors import ReceiptInvalid
from fednano.security.canonical import canonical, parse_canonical, sha256_hex
from fednano.security.keys import Signer, valid_signature
from fednano.unlearning.jobs.ledger import Ledger

__all__ = ["LIMITS", "NOT_AVAILABLE", "available", "check_discreet", "sign_receipt", "verify_receipt"]

NOT_AVAILABLE = "not available"
"""What stands where a figure does not exist."""

LIMITS = (
    "the server signs what it measured; nobody else repeated the measurement",
    "approximate unlearning is judged by figures, not proven; only retraining is exact",
    "copies of earlier adapters outside of the run folder are not reached by this job",
)

_PURPOSE = "unlearning receipt"


def available(figures: object) -> Any:
    """Figures as a receipt holds them: what is missing, empty or not finite becomes :data:`NOT_AVAILABLE`.

    Raises:
        ReceiptInvalid: there is text among them, which could carry data.
    """
    if figures is None or (isinstance(figures, float) and not math.isfinite(figures)):
        return NOT_AVAILABLE
    if isinstance(figures, Mapping):
        return {str(name): available(value) for name, value in figures.items()} or NOT_AVAILABLE
    if isinstance(figures, list | tuple):
        return [available(value) for value in figures] or NOT_AVAILABLE
    if isinstance(figures, bool | int | float) or figures == NOT_AVAILABLE:
        return figures
    raise ReceiptInvalid(f"a figure is {type(figures).__name__}; a receipt holds numbers only.")


def check_discreet(content: bytes, secrets: Iterable[str]) -> None:
    """Raise ReceiptInvalid if one of ``secrets`` (sample ids) stands in ``content`` in clear text."""
    text = content.decode("utf-8")
    for secret in secrets:
        if len(secret) > 3 and secret in text:
            raise ReceiptInvalid("the receipt would name a sample in clear text; it is not written.")


def sign_receipt(signer: Signer, body: Mapping[str, Any]) -> bytes:
    """The content of a receipt file.

    Raises:
        ValueError: ``body`` is no JSON.
    """
    content = canonical(body)
    envelope = {
        "public_key": signer.public,
        "receipt": dict(body),
        "signature": signer.sign(_PURPOSE, content),
    }
    return canonical(envelope) + b"\n"


def verify_receipt(content: bytes, public: str, *, log: Path | None = None) -> dict[str, Any]:
    """Check a receipt offline.

    Args:
        content: the file.
        public: the server's public key, hexadecimal.
        log: the run's log, to check that the receipt stands in it; ``None`` checks the receipt alone.

    Returns:
        What the receipt says.

    Raises:
        ReceiptInvalid: what is wrong with it.
    """
    if not content.endswith(b"\n"):
        raise ReceiptInvalid("the receipt is cut off: it does not end with a newline.")
    try:
        envelope = parse_canonical(content[:-1])
    except ValueError as error:
        raise ReceiptInvalid(f"the receipt was changed, or is none: {error}.") from error
    if not isinstance(envelope, dict) or set(envelope) != {"public_key", "receipt", "signature"}:
        raise ReceiptInvalid("expected an object with public_key, receipt and signature.")
    if envelope["public_key"] != public:
        raise ReceiptInvalid(
            f"the receipt names the key {str(envelope['public_key'])[:16]}..., the key given is {public[:16]}.... "
            "Ask the server's operator for the right public key, by another way than the receipt's."
        )
    body = envelope["receipt"]
    if not isinstance(body, dict) or not valid_signature(
        public, _PURPOSE, canonical(body), str(envelope["signature"])
    ):
        raise ReceiptInvalid("the signature does not fit: the receipt was changed, or another key signed it.")
    if log is not None:
        _check_in_log(content, body, public, log)
    return body


def _check_in_log(content: bytes, body: Mapping[str, Any], public: str, log: Path) -> None:
    if not log.is_file():
        raise ReceiptInvalid(f"there is no log at {log}.")
    place = body["log"]
    entries = Ledger(log, str(body["run"])).verify(public)
    if place["index"] >= len(entries):
        raise ReceiptInvalid(
            f"the receipt is number {place['index']} of the log, which has {len(entries)} lines only: the log was cut."
        )
    entry = entries[place["index"]]
    if entry["sha256"] != sha256_hex(content) or entry["previous"] != place["previous"]:
        raise ReceiptInvalid(f"line {place['index'] + 1} of the log is about another receipt.")
