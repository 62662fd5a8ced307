"""The uplink through a codec: encoded by the client, decoded by the server, one blob on the wire.

Both sides know the leaves' names and shapes, so the payloads are laid end to end in the order of the names, and no
header repeats what is known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fednano.aggregation import (
    Codec,
    Leaves,
    Refusal,
    codec_in_round,
    create_codec,
    decode_fisher,
    encode_fisher,
)
from fednano.errors import ConfigError
from fednano.federation.config import RunConfig, Scalar
from fednano.federation.recipe import parse_settings

__all__ = [
    "PLAIN",
    "codec_advice",
    "codec_asked",
    "codec_for",
    "pack_fisher",
    "pack_update",
    "unpack_fisher",
    "unpack_update",
]

PLAIN = "fp32"
"""The name under which leaves travel as they are."""

_BLOB = "payload"


def codec_for(name: str, options: str) -> Codec | None:
    """The codec that the settings name; ``None`` for plain leaves.

    Raises:
        ConfigError: there is no such codec, or it has no such option.
    """
    if name == PLAIN:
        if options:
            raise ConfigError(f"codec-options is {options!r}, but codec is {PLAIN!r}, which has no options.")
        return None
    return create_codec(name, **parse_settings(options, "codec-options"))


def codec_advice(config: RunConfig, number: int) -> dict[str, Scalar]:
    """What clients are told of the codec in one round; nothing where leaves are plain."""
    codec = codec_for(config.codec, config.codec_options)
    if codec is None:
        return {}
    if codec_in_round(codec, number, config.rounds) is not codec:
        return {"codec": codec.last}
    return {"codec": config.codec, "codec_options": config.codec_options}


def codec_asked(advice: Mapping[str, Scalar]) -> Codec | None:
    """The codec that the server's advice names."""
    return codec_for(str(advice.get("codec", PLAIN)), str(advice.get("codec_options", "")))


def pack_update(
    codec: Codec, leaves: Leaves, current: Leaves, carry: Mapping[str, Tensor]
) -> tuple[Leaves, Leaves, Leaves]:
    """On the client: what travels, what the server will make of it, and what the encoding lost.

    Args:
        codec: encodes the change of each leaf.
        leaves: trained leaves that travel.
        current: the leaves that the client started from.
        carry: what was lost before, by leaf; leaves that do not travel this time keep theirs.
    """
    payloads, lost = codec.encode(leaves, current, carry)
    seen = codec.decode(payloads, current)
    return _join(payloads), seen, {**{k: v for k, v in carry.items() if k not in leaves}, **lost}


def unpack_update(codec: Codec, blob: Leaves, current: Leaves, names: Collection[str]) -> Leaves:
    """On the server: the leaves ``names`` that a blob stands for.

    Raises:
        Refusal: the blob is not what the codec makes of these leaves.
    """
    sizes = {name: codec.nbytes(tuple(current[name].shape)) for name in sorted(names)}
    return codec.decode(_cut(blob, sizes, codec.name), current)


def pack_fisher(fisher: Leaves) -> Leaves:
    """A diagonal Fisher as 8 bits an element and one scale per leaf."""
    return _join(encode_fisher(fisher))


def unpack_fisher(blob: Leaves, current: Leaves, names: Collection[str]) -> Leaves:
    """Inverse of :func:`pack_fisher`. Raises Refusal for anything else."""
    shapes = {name: tuple(current[name].shape) for name in sorted(names)}
    sizes = {name: current[name].numel() + 4 for name in sorted(names)}
    return decode_fisher(_cut(blob, sizes, "8-bit Fisher"), shapes)


def _join(payloads: Leaves) -> Leaves:
    return {_BLOB: torch.cat([payloads[name] for name in sorted(payloads)])}


def _cut(blob: Leaves, sizes: Mapping[str, int], what: str) -> Leaves:
    whole = blob.get(_BLOB)
    total = sum(sizes.values())
    if set(blob) != {_BLOB} or whole is None or whole.dtype != torch.uint8 or whole.shape != (total,):
        got = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in blob.items()}
        raise Refusal("codec", f"got {got}, expected {total} bytes of {what}")
    return dict(zip(sizes, torch.split(whole, list(sizes.values())), strict=True))
