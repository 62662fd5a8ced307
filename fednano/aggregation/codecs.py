"""Uplink codecs: a client's change as few bytes, decoded in the aggregator.

What is encoded is the change ``theta_k - theta`` (both sides hold ``theta``), because a change is small and
centred. Each leaf becomes one ``uint8`` tensor, whose length `Codec.nbytes` gives exactly. Codecs with *error
feedback* (1-bit SGD, arXiv 1901.09847) add to the next round's change what this round's encoding lost; the loss
is the client's own state and stays on its disk.

=======  ====================================================================  ======================
codec    payload of a leaf of n elements                                       error of an element
=======  ====================================================================  ======================
none     4 n: the change in float32                                            2**-24 relative
bf16     2 n                                                                   2**-9 relative
fp16     2 n, saturating                                                       2**-11 relative
int8     n + 4 ceil(n / group), group scales in float32                        scale / 2, scale = max / 127
int4     ceil(n / 2) + 4 ceil(n / group)                                       scale / 2, scale = max / 7
sign     ceil(n / 8) + 2 ceil(n / group), scale = mean absolute value          fed back, settled at last
topk     4 + positions (bits or 32-bit indices, the shorter) + 2 k             fed back
dct      4 + 4 c + 2 c rows: the c strongest columns after a DCT               fed back
=======  ====================================================================  ======================
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fednano.aggregation.codec import BF16, FP16, Codec
from fednano.aggregation.codec_fisher import decode_fisher, encode_fisher
from fednano.aggregation.codec_quantised import Int4, Int8, Sign
from fednano.aggregation.codec_sparse import DCT, TopK
from fednano.errors import ConfigError

__all__ = ["Codec", "codec_in_round", "codec_names", "create_codec", "decode_fisher", "encode_fisher"]

_CODECS: dict[str, type[Codec]] = {c.name: c for c in (Codec, BF16, FP16, Int8, Int4, Sign, TopK, DCT)}


def codec_names() -> list[str]:
    """Names of all codecs, sorted."""
    return sorted(_CODECS)


def create_codec(name: str, **options: Any) -> Codec:
    """A codec by name.

    Raises:
        ConfigError: unknown name, unknown option, or an option out of range.
    """
    if name not in _CODECS:
        raise ConfigError(f"no codec is called {name!r}; there are: {', '.join(codec_names())}")
    cls = _CODECS[name]
    known = sorted(f.name for f in dataclasses.fields(cls))
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"codec {name!r} has no option {', '.join(unknown)}; its options: {', '.join(known)}"
        )
    codec = cls(**options)
    if codec.last and codec.last not in _CODECS:
        raise ConfigError(
            f"codec {name!r}: got last={codec.last!r}, expected one of {', '.join(codec_names())}"
        )
    return codec


def codec_in_round(codec: Codec, number: int, rounds: int) -> Codec:
    """The codec of one round of a run.

    Args:
        codec: that the run was started with.
        number: of the round, from 1.
        rounds: of the run.
    """
    return create_codec(codec.last) if codec.last and number == rounds else codec
