"""Names and sizes that host and client share."""

from __future__ import annotations

__all__ = ["CHUNK_BYTES", "LABEL_BYTES", "MISSING_KEY", "REASON_KEY", "SCORES", "SERVICE"]

SERVICE = "fednano.host.v1.LanguageHost"
"""Full name of the gRPC service."""
REASON_KEY = "fednano-reason"
"""Trailing metadata entry that tells an answer of the host itself from one of the connection."""
MISSING_KEY = "fednano-missing"
"""Trailing metadata entry with the indexes of samples that are not kept, such as ``"0,3"``."""
CHUNK_BYTES = 1 << 20
"""Size of a chunk, a quarter of gRPC's default limit on a message."""
LABEL_BYTES = 4
"""Bytes of one label on the wire."""
SCORES = 5
"""Numbers that a host says of each labelled token, see `fednano.models.language.LanguageModel.score`."""
