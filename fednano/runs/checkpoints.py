"""Checkpoints: one folder a round, written whole or not at all.

``round-0007/`` holds ``adapter.safetensors`` (the tensors) and ``state.json`` (everything else: strategy,
random state, score), with the sha256 of the tensors and of the state, so that damage is noticed. The hashes
find accidents; they do not stop somebody who may write to the folder. Nothing is pickled.

A new round is written into a temporary folder beside the others, flushed to the disk, and renamed. A process
that dies or a disk that fills in between leaves the earlier rounds as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fednano.errors import RunError
from fednano.runs.atomic import disk_advice, finite, read_json, sync_folder, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TENSORS", "Checkpoint", "list_checkpoints", "load_checkpoint", "pack", "save_checkpoint"]

TENSORS = "adapter.safetensors"
_STATE = "state.json"
_FORMAT = 1
_NAME = re.compile(r"round-(\d{4,})")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after a round.

    Attributes:
        round: number of the round, from 0.
        tensors: name -> tensor, on the CPU.
        state: what ``save_checkpoint`` was given.
        score: figure of merit, higher is better; None where none was given.
    """

    round: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    score: float | None = None


def save_checkpoint(
    folder: Path,
    number: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    score: float | None = None,
    keep_last: int = 3,
) -> Path:
    """Save a round; an earlier checkpoint of the same round is replaced.

    Args:
        folder: the folder of all checkpoints; made if needed.
        number: the round, from 0.
        tensors: name -> tensor, of any shape, on any device.
        state: JSON values that resuming needs.
        score: figure of merit, higher is better. The best round so far is kept besides the last ones.
        keep_last: how many of the newest rounds to keep, at least 1.

    Returns:
        The folder of this round.

    Raises:
        RunError: ``state`` is no JSON, an argument is out of range, or the disk is full. Earlier rounds are
            intact then.
    """
    if number < 0 or keep_last < 1:
        raise RunError(f"A checkpoint needs round >= 0 and keep_last >= 1; got {number} and {keep_last}.")
    payload = pack(tensors)
    body = {
        "format": _FORMAT,
        "round": number,
        "score": score,
        "sha256": {TENSORS: _sha(payload)},
        "state": dict(state),
    }
    try:
        if finite(body) != body:
            raise ValueError("a key is no string, or a number is not finite")
        text = json.dumps({**body, "state_sha256": _sha(_canonical(body))}, indent=2).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise RunError(f"The state of round {number} cannot be saved as JSON: {error}.") from error

    target = folder / f"round-{number:04d}"
    temporary = folder / f".new-{target.name}-{uuid.uuid4().hex[:8]}"
    retired = folder / f".old-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _recover(folder)
        temporary.mkdir()
        write_bytes(temporary / TENSORS, payload)
        write_bytes(temporary / _STATE, text)
        sync_folder(temporary)
        if target.exists():
            target.rename(retired)
        temporary.rename(target)
        sync_folder(folder)
    except (OSError, RunError) as error:
        with contextlib.suppress(OSError):
            _recover(folder)
        kept = list_checkpoints(folder)
        last = f"The checkpoint of round {kept[-1]} is intact." if kept else "No earlier checkpoint exists."
        cause = error.__cause__ if isinstance(error, RunError) else error
        assert isinstance(cause, OSError)
        advice = disk_advice(folder, len(payload) + len(text), cause)
        raise RunError(f"The checkpoint of round {number} could not be saved: {advice} {last}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)
    _prune(folder, keep_last)
    return target


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file.

    Args:
        tensors: name -> tensor, of any shape, on any device; they may share memory.
    """
    from safetensors.torch import save

    # clones, because safetensors refuses tensors that share memory
    content: bytes = save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )
    return content


def load_checkpoint(folder: Path, number: int | None = None) -> Checkpoint:
    """Load a round, after checking its hashes.

    Args:
        folder: the folder of all checkpoints.
        number: the round; None for the newest.

    Raises:
        RunError: there is no such round, or it is damaged. The message names the rounds that there are.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    with contextlib.suppress(OSError):
        _recover(folder)
    rounds = list_checkpoints(folder)
    if not rounds:
        raise RunError(f"There is no checkpoint in {folder}. Start the run anew.")
    number = rounds[-1] if number is None else number
    if number not in rounds:
        raise RunError(
            f"There is no checkpoint of round {number} in {folder}; there are rounds {rounds}. Name one."
        )
    target = folder / f"round-{number:04d}"
    others = [each for each in rounds if each != number]
    advice = (
        f"Resume from another round: {others}." if others else "No other round was kept; start the run anew."
    )
    body = _read_state(target, advice)
    if body["round"] != number:
        raise RunError(f"{target} holds round {body['round']!r}, not {number}: somebody renamed it. {advice}")
    try:
        payload = (target / TENSORS).read_bytes()
        if _sha(payload) != body["sha256"][TENSORS]:
            raise RunError(f"{target / TENSORS} is damaged: its sha256 is not the one in {_STATE}. {advice}")
        tensors: dict[str, Tensor] = load(payload)
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"{target / TENSORS} cannot be read: {error}. {advice}") from error
    return Checkpoint(number, tensors, body["state"], body["score"])


def list_checkpoints(folder: Path) -> list[int]:
    """The rounds that have a checkpoint in ``folder``, ascending."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def _read_state(target: Path, advice: str) -> dict[str, Any]:
    try:
        body = read_json(target / _STATE)
    except RunError as error:
        raise RunError(f"{target} is damaged: {error} {advice}") from error
    keys = {"format", "round", "score", "sha256", "state", "state_sha256"}
    if not isinstance(body, dict) or set(body) != keys:
        raise RunError(f"{target / _STATE} is damaged: expected the keys {sorted(keys)}. {advice}")
    if body["format"] != _FORMAT:
        raise RunError(
            f"{target / _STATE} has format {body['format']!r}; this version reads format {_FORMAT}. "
            "Use the version of fednano that made the run."
        )
    claimed = body.pop("state_sha256")
    if claimed != _sha(_canonical(body)):
        raise RunError(f"{target / _STATE} is damaged: its content does not match its own sha256. {advice}")
    return body


def _prune(folder: Path, keep_last: int) -> None:
    rounds = list_checkpoints(folder)
    keep = set(rounds[-keep_last:])
    scores: dict[int, float] = {}
    for number in rounds:
        with contextlib.suppress(RunError):
            score = _read_state(folder / f"round-{number:04d}", "")["score"]
            if score is not None:
                scores[number] = float(score)
    if scores:
        keep.add(max(scores, key=lambda number: (scores[number], number)))
    for number in rounds:
        if number not in keep:
            # Renamed before it is emptied: a half-deleted folder must not look like a checkpoint.
            doomed = folder / f".gone-round-{number:04d}-{uuid.uuid4().hex[:8]}"
            with contextlib.suppress(OSError):
                (folder / f"round-{number:04d}").rename(doomed)
                shutil.rmtree(doomed)


def _recover(folder: Path) -> None:
    """Finish what a killed process began: put back a round that was moved aside, clear unfinished folders."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if path.name.startswith(".old-round-"):
            target = folder / path.name.removeprefix(".old-")
            if target.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(target)
        elif path.name.startswith((".new-round-", ".gone-round-")):
            shutil.rmtree(path, ignore_errors=True)


def _canonical(body: object) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
