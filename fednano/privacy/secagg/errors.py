"""How a session of secure aggregation can fail."""

from __future__ import annotations

from fednano.errors import FednanoError

__all__ = ["BelowThreshold", "ProtocolError"]


class ProtocolError(FednanoError):
    """A message of the protocol is malformed, inconsistent, or comes at the wrong time; nothing of it is used."""


class BelowThreshold(FednanoError):
    """Too few clients are left to add up securely; no sum is computed and nobody's secret is revealed."""
