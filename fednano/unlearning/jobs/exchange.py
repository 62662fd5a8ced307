"""Exchange the global adapter: all of it or nothing, whenever the process dies.

Everything that needs space is written beside the run first. Then one database transaction promises the exchange, and
from there on it is carried out, by this process or by the next one. Each step can be repeated:

1. ``commit.json`` tells training that an exchange is under way;
2. the new tensors are written under their own name, and one rename of ``adapter.json`` lets it point to them. Readers
   get the old adapter before that rename and the new one after it;
3. ``adapter.safetensors`` is replaced and ``adapter.json`` points to it again;
4. tombstones, log lines and receipts are written;
5. one transaction moves the jobs and fulfils the promise; ``commit.json`` goes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fednano.errors import RunError
from fednano.runs.atomic import write_bytes, write_json
from fednano.runs.tombstones import PENDING, Tombstones, read_tombstones, write_tombstones
from fednano.security.canonical import sha256_hex
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.states import State

__all__ = ["Exchange", "carry_out", "finish_pending", "stage"]

TENSORS = "adapter.safetensors"


@dataclass(frozen=True)
class Exchange:
    """A promised exchange.

    Attributes:
        batch: the batch it belongs to.
        target: the state of its jobs afterwards.
        jobs: their ids.
        before: sha256 of the adapter that is replaced.
        after: sha256 of the one that replaces it.
        staged: name of the staged adapter in the batch's folder: ``"after"`` or ``"before"``.
        tombstones: all tombstones afterwards.
        lines: lines for the log, in order.
        receipts: job id -> content of its receipt.
        facts: what to keep with every job.
        actor: who did it.
        note: why.
    """

    batch: str
    target: str
    jobs: Sequence[str]
    before: str
    after: str
    staged: str
    tombstones: Mapping[str, Any]
    lines: Sequence[str]
    receipts: Mapping[str, str]
    facts: Mapping[str, Any]
    actor: str
    note: str


def stage(place: Place, batch: str, name: str, payload: bytes, info: Mapping[str, Any]) -> None:
    """Keep an adapter in a batch's folder. Raises RunError on a full disk; nothing has changed then."""
    folder = place.staging(batch)
    write_bytes(folder / f"{name}.safetensors", payload)
    write_json(folder / f"{name}.json", {**info, "sha256": sha256_hex(payload)})


def carry_out(place: Place, exchange: Exchange) -> None:
    """Promise an exchange and carry it out.

    Raises:
        RunError: a step failed (a full disk); it is finished by the next `fednano unlearn run`.
    """
    place.store.intend(exchange.batch, "exchange", asdict(exchange))
    _roll_forward(place, exchange)


def finish_pending(place: Place) -> list[str]:
    """Finish what a killed process had promised.

    Returns:
        What was done, for people.
    """
    done = []
    for batch, _, body in place.store.intents():
        exchange = Exchange(**body)
        current = place.adapter()[0]
        if current not in (exchange.before, exchange.after):
            # Somebody wrote another adapter before the exchange began; nothing of it may be applied to that one.
            _mark(place).unlink(missing_ok=True)
            place.store.drop_intent(batch)
            done.append(
                f"{', '.join(exchange.jobs)}: the adapter changed meanwhile, so the exchange is taken back"
            )
            continue
        _roll_forward(place, exchange)
        done.append(f"{', '.join(exchange.jobs)}: a cut-off exchange was finished")
    if not done and _mark(place).exists():
        _mark(place).unlink()
    return done


def _roll_forward(place: Place, exchange: Exchange) -> None:
    write_json(_mark(place), {"jobs": list(exchange.jobs), "after": exchange.after})
    _swap(place, exchange)
    wanted = Tombstones.from_json(exchange.tombstones)
    if read_tombstones(place.folder.path) != wanted:
        write_tombstones(place.folder.path, wanted)
    for line in exchange.lines:
        place.ledger.append(line.encode())
    for job, content in exchange.receipts.items():
        write_bytes(place.receipt(job), content.encode())
    place.store.move(
        exchange.jobs,
        State(exchange.target),
        actor=exchange.actor,
        note=exchange.note,
        facts=exchange.facts,
        done=exchange.batch,
    )
    _mark(place).unlink(missing_ok=True)


def _swap(place: Place, exchange: Exchange) -> None:
    folder = place.staging(exchange.batch)
    payload = (folder / f"{exchange.staged}.safetensors").read_bytes()
    info = json.loads((folder / f"{exchange.staged}.json").read_bytes())
    if sha256_hex(payload) != exchange.after or info.pop("sha256") != exchange.after:
        raise RunError(
            f"the staged adapter in {folder} is damaged: its sha256 is not {exchange.after[:16]}...."
        )
    root = place.folder.path
    own = f"adapter-{exchange.after[:16]}.safetensors"
    if place.adapter()[0] != exchange.after:
        write_bytes(root / own, payload)
        write_json(root / "adapter.json", {**info, "sha256": exchange.after, "file": own})
    write_bytes(root / TENSORS, payload)
    write_json(root / "adapter.json", {**info, "sha256": exchange.after})
    with contextlib.suppress(FileNotFoundError):
        (root / own).unlink()


def _mark(place: Place) -> Path:
    return place.folder.path / PENDING
