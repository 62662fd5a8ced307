"""What server and clients say to each other, as Flower records.

Tensors travel as one safetensors blob inside an ``Array``: no pickle, any dtype (Flower's own NumPy arrays cannot
carry bfloat16), and a header that is checked before anything is read. Everything else is a flat ``ConfigRecord`` or
``MetricRecord``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fednano.errors import FednanoError, UpdateRefused
from fednano.federation.config import RunConfig, Scalar
from fednano.runs.tombstones import Tombstones

__all__ = [
    "Failure",
    "HostTicket",
    "Instruction",
    "Reply",
    "decode_tensors",
    "encode_tensors",
    "record_bytes",
    "tombstone_record",
]

_STYPE = "fednano.safetensors"


def encode_tensors(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors of any shapes and dtypes as one record."""
    blob = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return ArrayRecord({"tensors": Array(dtype="uint8", shape=(len(blob),), stype=_STYPE, data=blob)})


def decode_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Inverse of :func:`encode_tensors`.

    Raises:
        UpdateRefused: the record is not one that :func:`encode_tensors` makes.
    """
    if set(record) != {"tensors"} or record["tensors"].stype != _STYPE:
        raise UpdateRefused(
            f"got a record with the arrays {sorted(record)}; expected one array 'tensors' of type {_STYPE}."
        )
    try:
        return load(record["tensors"].data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UpdateRefused(f"the update is not valid safetensors: {error}.") from error


def record_bytes(content: RecordDict) -> int:
    """Bytes that Flower puts on the wire for these records: the sum over the objects it transfers."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def tombstone_record(tombstones: Tombstones) -> ConfigRecord:
    """Tombstones as a record of a message."""
    return ConfigRecord({"tombstones": json.dumps(tombstones.to_json())})


@dataclass(frozen=True)
class HostTicket:
    """How a client reaches the run's language host.

    Attributes:
        address: ``host:port``; empty when no host is used (placement ``local``).
        token: the run's token, which the host asks for.
        root_certificates: PEM of the authority that signed the host's certificate; empty = plain text, which
            client and host allow on the loopback interface only.
        fingerprint: identity of the hosted weights.
    """

    address: str = ""
    token: bytes = b""
    root_certificates: bytes = b""
    fingerprint: str = ""


@dataclass(frozen=True)
class Instruction:
    """One request to a client.

    Attributes:
        config: the run's settings.
        phase: name of the phase, such as ``"federated"`` or ``"local-only"``.
        round: counted from 1; 0 outside of rounds.
        ticket: how to reach the language host.
        pool: train on the data of all simulated clients at once (the centralised baseline).
        advice: what the merge rule asks of local training, such as ``{"fisher": True}``.
        leaves: adapter leaves to start from; those that every client has or keeps to itself need not travel.
        basis: fingerprint of the adapters' basis, where the server has shipped one.
        run: id of the run, under which a client keeps its memory.
        accepted: the last round whose update of this client was merged; 0 = none.
        extra: what a merge rule sends beside the leaves: control variates, residuals.
        tombstones: samples that the client must leave out; set on the way by `ForgettingGrid`.
        secure: the exchange of secure aggregation that this request belongs to, see `secure_client`; empty without it.
    """

    config: RunConfig
    phase: str
    round: int
    ticket: HostTicket
    pool: bool
    advice: dict[str, Scalar]
    leaves: dict[str, Tensor]
    basis: str = ""
    run: str = "run"
    accepted: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)
    tombstones: Tombstones = field(default_factory=Tombstones)
    secure: dict[str, Any] = field(default_factory=dict)

    def to_records(self, shared: dict[int, ArrayRecord] | None = None) -> RecordDict:
        """As the content of a Flower message.

        Args:
            shared: encoded tensors by the identity of their mapping. Requests to many clients that are made with one
                such dict hold one copy of what is the same for all.
        """

        def encoded(tensors: dict[str, Tensor]) -> ArrayRecord:
            if shared is None:
                return encode_tensors(tensors)
            if id(tensors) not in shared:
                shared[id(tensors)] = encode_tensors(tensors)
            return shared[id(tensors)]

        content = RecordDict(
            {
                "config": ConfigRecord(dict(self.config.to_mapping())),
                "task": ConfigRecord(
                    {
                        "phase": self.phase,
                        "round": self.round,
                        "pool": self.pool,
                        "host-address": self.ticket.address,
                        "host-token": self.ticket.token,
                        "host-root": self.ticket.root_certificates,
                        "host-fingerprint": self.ticket.fingerprint,
                        "basis": self.basis,
                        "run": self.run,
                        "accepted": self.accepted,
                    }
                ),
                "advice": ConfigRecord(dict(self.advice)),
                "leaves": encoded(self.leaves),
            }
        )
        if self.extra:
            content["extra"] = encoded(self.extra)
        if self.secure:
            content["secure"] = ConfigRecord(self.secure)
        return content

    @classmethod
    def from_records(cls, content: RecordDict) -> Instruction:
        """Inverse of :meth:`to_records`."""
        task: Any = content.config_records["task"]
        return cls(
            config=RunConfig.from_mapping(dict(content.config_records["config"])),
            phase=task["phase"],
            round=task["round"],
            ticket=HostTicket(
                task["host-address"], task["host-token"], task["host-root"], task["host-fingerprint"]
            ),
            pool=task["pool"],
            advice=cast("dict[str, Scalar]", dict(content.config_records["advice"])),
            leaves=decode_tensors(content.array_records["leaves"]),
            basis=task["basis"],
            run=task["run"],
            accepted=task["accepted"],
            extra=decode_tensors(content.array_records["extra"]) if "extra" in content.array_records else {},
            tombstones=_tombstones(content),
            secure=dict(content.config_records["secure"]) if "secure" in content.config_records else {},
        )


def _tombstones(content: RecordDict) -> Tombstones:
    if "tombstones" not in content.config_records:
        return Tombstones()
    return Tombstones.from_json(json.loads(str(content.config_records["tombstones"]["tombstones"])))


@dataclass(frozen=True)
class Failure:
    """Why a client could not do what it was asked.

    Attributes:
        kind: class name of the error, such as ``"TrainingDiverged"``.
        message: one line for the operator.
    """

    kind: str
    message: str


@dataclass(frozen=True)
class Reply:
    """A client's answer.

    Attributes:
        client: its stable name.
        round: the round it answers.
        metrics: plain numbers.
        facts: plain strings, such as fingerprints.
        leaves: trained leaves, or none.
        fisher: diagonal Fisher, or none.
        failure: set when the request failed; everything else may then be empty.
    """

    client: str
    round: int
    metrics: dict[str, float]
    facts: dict[str, str]
    leaves: dict[str, Tensor] | None = None
    fisher: dict[str, Tensor] | None = None
    failure: Failure | None = None

    @classmethod
    def failed(cls, client: str, round_number: int, error: FednanoError) -> Reply:
        """A reply that carries an error instead of a result."""
        return cls(client, round_number, {}, {}, failure=Failure(type(error).__name__, str(error)))

    def to_records(self) -> RecordDict:
        """As the content of a Flower message."""
        head: dict[str, Any] = {"client": self.client, "round": self.round}
        if self.failure is not None:
            head |= {"error-kind": self.failure.kind, "error": self.failure.message}
        content = RecordDict(
            {
                "head": ConfigRecord(head),
                "facts": ConfigRecord(dict(self.facts)),
                "metrics": MetricRecord({name: float(value) for name, value in self.metrics.items()}),
            }
        )
        if self.leaves is not None:
            content["leaves"] = encode_tensors(self.leaves)
        if self.fisher is not None:
            content["fisher"] = encode_tensors(self.fisher)
        return content

    @classmethod
    def from_records(cls, content: RecordDict) -> Reply:
        """Inverse of :meth:`to_records`.

        Raises:
            UpdateRefused: the reply does not have the expected records.
        """
        try:
            head: Any = content.config_records["head"]
            client, round_number = str(head["client"]), int(head["round"])
            facts = {name: str(value) for name, value in content.config_records["facts"].items()}
            metrics = {
                name: float(value)
                for name, value in content.metric_records["metrics"].items()
                if isinstance(value, (int, float))
            }
            failure = Failure(str(head["error-kind"]), str(head["error"])) if "error" in head else None
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UpdateRefused(f"the reply lacks what every reply has ({error}).") from error
        arrays = content.array_records
        return cls(
            client=client,
            round=round_number,
            metrics=metrics,
            facts=facts,
            leaves=decode_tensors(arrays["leaves"]) if "leaves" in arrays else None,
            fisher=decode_tensors(arrays["fisher"]) if "fisher" in arrays else None,
            failure=failure,
        )
