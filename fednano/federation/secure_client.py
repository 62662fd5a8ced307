"""A client's answers in secure aggregation; the protocol itself is :mod:`fednano.privacy.secagg`.

Between two messages the client's part of the session lies in one private file of its memory, written before each answer
leaves and deleted before the last: a repeated or changed request finds that the answer was given, in whatever process
it arrives.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fednano.aggregation import LeafSpec, Product, Spec, Update, layout_of, validate, vector_of
from fednano.errors import RunError
from fednano.federation.client_state import ClientState
from fednano.federation.messages import Instruction, Reply
from fednano.federation.private import bounded
from fednano.privacy.secagg import Client, ProtocolError
from fednano.privacy.secagg.keys import PUBLIC_BYTES, Public
from fednano.runs.atomic import disk_advice, replace_file

__all__ = ["LOSS", "answer", "check_ready", "masked", "packed", "spec_from_json", "spec_to_json", "unpacked"]

LOSS = "loss"
"""The scalar sum of each client's training loss times its weight."""

_FILE = "secure-aggregation.json"


def answer(instruction: Instruction, name: str, memory: ClientState) -> Reply:
    """The first, second or last answer of a session, which need neither model nor data.

    Raises:
        ProtocolError: the request is malformed or comes at the wrong time.
        BelowThreshold: too few clients are left.
        RunError: the disk is full.
    """
    asked = instruction.secure
    try:
        stage, session = str(asked["stage"]), bytes(asked["session"])
        if stage == "keys":
            client = Client(session)
            sent = {"keys": _tensor(client.keys().to_bytes())}
        elif stage == "shares":
            client = _load(memory, session)
            sealed = client.shares(int(asked["index"]), _neighbours(asked), int(asked["threshold"]))
            sent = packed(sealed)
        elif stage == "reveal":
            client = _load(memory, session)
            received = dict(zip(asked["senders"], asked["sealed"], strict=True))
            shares = client.reveal(asked["survivors"], received)
            _path(memory).unlink()
            return Reply(name, instruction.round, {}, {}, packed(shares))
        else:
            raise ProtocolError(f"asked for exchange {stage!r}; expected 'keys', 'shares' or 'reveal'.")
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the request lacks what secure aggregation needs ({error}).") from error
    _save(memory, client)
    return Reply(name, instruction.round, {}, {}, sent)


def check_ready(instruction: Instruction, memory: ClientState) -> None:
    """Refuse a request to train for a session in which this client cannot send a masked update, before it trains.

    Raises:
        ProtocolError: it does not know the session, or has sent its update.
    """
    client = _load(memory, bytes(instruction.secure.get("session", b"")))
    if client.done != 2:
        raise ProtocolError(
            f"asked to train for a secure aggregation after {client.done} of its answers, expected 2."
        )


def masked(
    reply: Reply, instruction: Instruction, rule: Any, current: Mapping[str, Tensor], memory: ClientState
) -> Reply:
    """A reply to a training request with the update behind its masks, and nothing else of what was learnt.

    Args:
        reply: as it would go out in the clear.
        instruction: what was asked.
        rule: the merge rule, whose part of this client is sent.
        current: the leaves that the client started from.
        memory: of the client.

    Raises:
        Refusal: the update breaks a bound of the run.
        ProtocolError: the client is not in a session, or has sent its update.
    """
    assert reply.leaves is not None
    spec = spec_from_json(str(instruction.secure["spec"]))
    number, metrics = instruction.round, reply.metrics
    update = Update(
        client=reply.client,
        round=number,
        weight=metrics["samples"],
        leaves=reply.leaves,
        fisher=reply.fisher,
        metrics={"steps": metrics["steps"], "lr": metrics["learning-rate"]},
    )
    needs_fisher = bool(rule.client_config(number).get("fisher"))
    validate(update, spec, round=number, names=rule.travelling(spec, number), needs_fisher=needs_fisher)
    begun, config = {name: current[name] for name in spec.leaves}, instruction.config
    if config.dp == "client":  # the noise of as many as must be left is enough
        update = bounded(update, begun, config, share=1.0 / int(instruction.secure["least"]))
    layout = layout_of(rule, spec, begun, round=number, extra=(LOSS,))
    extra = {LOSS: metrics["loss"] * update.weight} if config.dp == "off" else {}
    vector = vector_of(layout, rule, spec, begun, update, round=number, extra=extra)
    client = _load(memory, bytes(instruction.secure["session"]))
    hidden = client.mask(vector, list(instruction.secure["active"]))
    _save(memory, client)
    words = torch.from_numpy(hidden.view(np.int64))
    seen = {name: value for name, value in metrics.items() if name in _TRAFFIC}
    return Reply(reply.client, number, seen, reply.facts, {"masked": words})


_TRAFFIC = ("seconds", "encoded", "step-sent", "step-received", "step-samples", "epsilon")
"""What the server may know of a client's training: the language host sees it anyway, and what privacy cost is
public."""


def packed(messages: Mapping[int, bytes]) -> dict[str, Tensor]:
    """Messages of one length by client number, as tensors: numbers ``(m,)`` int64, bytes ``(m, length)`` uint8."""
    numbers = sorted(messages)
    body = b"".join(messages[number] for number in numbers)
    width = len(body) // max(1, len(numbers))
    return {
        "numbers": torch.tensor(numbers, dtype=torch.int64),
        "bytes": _tensor(body).reshape(len(numbers), width),
    }


def unpacked(tensors: Mapping[str, Tensor]) -> dict[int, bytes]:
    """Inverse of `packed`. Raises ProtocolError for anything else."""
    numbers, body = tensors.get("numbers"), tensors.get("bytes")
    if numbers is None or body is None or set(tensors) != {"numbers", "bytes"}:
        raise ProtocolError(f"got the tensors {sorted(tensors)}, expected 'numbers' and 'bytes'.")
    fits = numbers.dtype == torch.int64 and body.dtype == torch.uint8 and numbers.ndim == 1 and body.ndim == 2
    if not fits or len(numbers) != len(body) or len(set(numbers.tolist())) != len(numbers):
        raise ProtocolError("the messages to other clients are not one each.")
    return {int(number): bytes(row) for number, row in zip(numbers, body.numpy(), strict=True)}


def spec_to_json(spec: Spec) -> str:
    """What every update must look like, for the clients that check it in the server's stead; without fingerprints."""
    return json.dumps(
        {
            "leaves": {n: [list(leaf.shape), str(leaf.dtype)] for n, leaf in spec.leaves.items()},
            "products": {s: [p.left, p.right, p.scale, p.down] for s, p in spec.products.items()},
            "algebra": spec.algebra,
            "max_clients": spec.max_clients,
            "max_abs": spec.max_abs,
            "max_weight": spec.max_weight,
            "max_norm": spec.max_norm,
            "rank_limit": spec.rank_limit,
        }
    )


def spec_from_json(text: str) -> Spec:
    """Inverse of `spec_to_json`. Raises ProtocolError for anything else."""
    try:
        value = json.loads(text)
        leaves = {
            name: LeafSpec(tuple(shape), getattr(torch, dtype.removeprefix("torch.")))
            for name, (shape, dtype) in value.pop("leaves").items()
        }
        products = {site: Product(*parts) for site, parts in value.pop("products").items()}
        return Spec(leaves, products=products, **value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(f"the server's description of an update cannot be read: {error}.") from error


def _neighbours(asked: Mapping[str, Any]) -> dict[int, Public]:
    blob, numbers = bytes(asked["keys"]), list(asked["neighbours"])
    if len(blob) != PUBLIC_BYTES * len(numbers) or len(set(numbers)) != len(numbers):
        raise ProtocolError(f"got {len(blob)} bytes of keys for {len(numbers)} neighbours.")
    cut = [blob[start : start + PUBLIC_BYTES] for start in range(0, len(blob), PUBLIC_BYTES)]
    return {int(v): Public.from_bytes(key) for v, key in zip(numbers, cut, strict=True)}


def _tensor(blob: bytes) -> Tensor:
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else torch.zeros(0, dtype=torch.uint8)


def _path(memory: ClientState) -> Path:
    return memory.folder / _FILE


def _load(memory: ClientState, session: bytes) -> Client:
    try:
        client = Client.from_json(json.loads(_path(memory).read_bytes()))
    except FileNotFoundError as error:
        raise ProtocolError(
            "this client is in no secure aggregation: it has left it, or its memory is gone."
        ) from error
    except (OSError, ValueError) as error:
        raise ProtocolError(
            f"this client's state of a secure aggregation cannot be read: {error}."
        ) from error
    if client.session != session:
        raise ProtocolError("this client is in another secure aggregation than the one it is asked for.")
    return client


def _save(memory: ClientState, client: Client) -> None:
    path, content = _path(memory), json.dumps(client.to_json()).encode()
    memory.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # a file of another mode would keep it
    try:
        replace_file(path, content, mode=0o600)
    except OSError as error:
        raise RunError(f"Cannot write {path}: {disk_advice(path.parent, len(content), error)}") from error
