"""Clients that ask a host for steps as fast as it answers: processes of their own, several clients in each.

A process is started once and takes one `Load` after the other, as lines of JSON on its stdin; it answers each with a
line on stdout. Clients of a load begin together, each with its own connection and its own random numbers, and each asks
again as soon as it has been answered. Times are those of ``time.monotonic``, which all processes of a machine share.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from fednano.errors import HostError, HostUnavailable
from fednano.host.client import RemoteLLM
from fednano.models.language_inputs import IGNORE

__all__ = ["Driven", "Drivers", "Load", "batch_of"]


@dataclass(frozen=True)
class Load:
    """What the clients do.

    Attributes:
        address: of the host.
        root_certificates: PEM, base64url; empty for plain text.
        token: bearer token, base64url; may be empty.
        seconds: how long they ask, at least.
        steps: how many steps each takes, at least.
        lengths: tokens of the samples of each client, so one number for each client.
        samples: of a request.
        answers: labelled tokens at the end of each sample.
        dtype: of embeddings, and on the wire.
        wire: another type on the wire, or empty.
        lossless: whether chunks travel coded, see `fednano.host.planes`.
        retry_seconds: how long a refused step is repeated.
        seed: of the first client's numbers; the next client's is one higher.
        keep_gradients: folder for each client's last gradient, or empty.
    """

    address: str
    lengths: tuple[int, ...]
    root_certificates: str = ""
    token: str = ""
    seconds: float = 2.0
    steps: int = 3
    samples: int = 1
    answers: int = 8
    dtype: str = "float32"
    wire: str = ""
    lossless: bool = False
    retry_seconds: float = 60.0
    seed: int = 0
    keep_gradients: str = ""


@dataclass
class Driven:
    """What became of a load.

    Attributes:
        steps: for each client its steps' (began, ended), in seconds.
        unavailable: steps that were given up because the host stayed busy or away.
        errors: whatever else went wrong; one text each.
        sent: bytes.
        received: bytes.
    """

    steps: list[list[tuple[float, float]]] = field(default_factory=list)
    unavailable: int = 0
    errors: list[str] = field(default_factory=list)
    sent: int = 0
    received: int = 0

    def rate(self) -> float:
        """Steps per second of all clients: the sum of their rates between their first answers and their last.

        Not what was answered within one time for all: a host answers the clients of a joint batch at once, and
        whichever answer such a time began or ended with would cut a batch in two.
        """
        ended = [[end for _, end in client] for client in self.steps if len(client) > 1]
        return sum((len(client) - 1) / (client[-1] - client[0]) for client in ended)

    def latency(self, share: float) -> float:
        """Seconds within which ``share`` of the steps were answered, each client's first left out."""
        found = sorted(end - begin for client in self.steps for begin, end in client[1:])
        return found[min(int(share * len(found)), len(found) - 1)] if found else 0.0

    def add(self, other: Driven) -> None:
        """Take in what other clients of the same load did."""
        self.steps += other.steps
        self.errors += other.errors
        self.unavailable += other.unavailable
        self.sent += other.sent
        self.received += other.received


def batch_of(width: int, vocabulary: int, load: Load, client: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings ``(samples, L, d)``, mask and labels of one client; the same numbers in every process."""
    generator = torch.Generator().manual_seed(load.seed + client)
    length = load.lengths[client]
    embeds = torch.randn(load.samples, length, width, generator=generator)
    labels = torch.full((load.samples, length), IGNORE)
    answers = min(load.answers, length - 1)
    labels[:, -answers:] = torch.randint(0, vocabulary, (load.samples, answers), generator=generator)
    mask = torch.ones(load.samples, length, dtype=torch.bool)
    return embeds.to(getattr(torch, load.dtype)), mask, labels


class Drivers:
    """A few client processes, each of which plays some of a load's clients. A context manager.

    Args:
        processes: how many.
    """

    def __init__(self, processes: int) -> None:
        # -P: see `fednano.host.process.host_command`.
        command = [sys.executable, "-P", "-m", "fednano.host.drive"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._children = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(processes)
        ]

    def __enter__(self) -> Drivers:
        for child in self._children:
            _read(child)  # it has loaded torch
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            child.stdout.close()

    def start(self, load: Load) -> None:
        """Set the clients going: client i is played by process i modulo their number."""
        for number, child in enumerate(self._children):
            mine = list(range(number, len(load.lengths), len(self._children)))
            _write(child, {"load": asdict(load), "clients": mine})

    def finish(self) -> Driven:
        """Wait until they have done it.

        Raises:
            HostError: a process ended.
        """
        whole = Driven()
        for child in self._children:
            found = Driven(**_read(child))
            found.steps = [[(begin, end) for begin, end in client] for client in found.steps]
            whole.add(found)
        return whole

    def run(self, load: Load) -> Driven:
        """`start`, then `finish`."""
        self.start(load)
        return self.finish()

    def kill(self) -> None:
        """End all processes at once, in the middle of whatever they do."""
        for child in self._children:
            child.kill()


def _write(child: subprocess.Popen[bytes], message: object) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(message).encode() + b"\n")
    child.stdin.flush()


def _read(child: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise HostError(f"a process of clients ended with status {child.wait()}; see what it wrote above")
    found: dict[str, Any] = json.loads(line)
    return found


def _connect(load: Load) -> RemoteLLM:
    root = base64.urlsafe_b64decode(load.root_certificates) or None
    return RemoteLLM(
        load.address,
        token=base64.urlsafe_b64decode(load.token) or None,
        root_certificates=root,
        insecure=root is None,
        wire_dtype=getattr(torch, load.wire or load.dtype),
        lossless=load.lossless,
        retry_seconds=load.retry_seconds,
        timeout_s=300.0,
    )


def _client(load: Load, client: int, gate: threading.Barrier, found: Driven) -> None:
    """One client's thread; ``found`` is its own."""
    steps: list[tuple[float, float]] = []
    found.steps.append(steps)
    with _connect(load) as llm:
        try:
            embeds, mask, labels = batch_of(llm.hidden_size, llm.vocab_size, load, client)
        finally:
            gate.wait()
        until, tried, gradient = time.monotonic() + load.seconds, 0, None
        while tried < load.steps or time.monotonic() < until:
            tried += 1
            x, began = embeds.detach().requires_grad_(), time.monotonic()
            try:
                (gradient,) = torch.autograd.grad(llm.loss(x, mask, labels).sum(), x)
                steps.append((began, time.monotonic()))
            except HostUnavailable:
                found.unavailable += 1
        if load.keep_gradients and gradient is not None:
            from safetensors.torch import save_file

            save_file({"gradient": gradient}, Path(load.keep_gradients) / f"{client}.safetensors")
        found.sent, found.received = llm.wire.step.sent_bytes, llm.wire.step.received_bytes


def play(load: Load, clients: Sequence[int]) -> Driven:
    """Play some of a load's clients, a thread each."""
    whole, gate = Driven(), threading.Barrier(max(len(clients), 1))
    parts = [Driven() for _ in clients]

    def one(client: int, part: Driven) -> None:
        try:
            _client(load, client, gate, part)
        except Exception as error:
            gate.abort()  # nobody waits for a client that will not come
            part.errors.append(f"client {client}: {type(error).__name__}: {error}"[:300])

    threads = [
        threading.Thread(target=one, args=pair, daemon=True) for pair in zip(clients, parts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in parts:
        whole.add(part)
    return whole


def main(source: IO[str], sink: IO[str]) -> None:
    """Play loads until ``source`` ends."""
    torch.set_num_threads(1)
    print(json.dumps({}), file=sink, flush=True)
    for line in source:
        message = json.loads(line)
        fields = message["load"]
        load = replace(Load(**fields), lengths=tuple(fields["lengths"]))
        print(json.dumps(asdict(play(load, message["clients"]))), file=sink, flush=True)


if __name__ == "__main__":
    main(sys.stdin, sys.stdout)
