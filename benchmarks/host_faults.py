"""A host under load: are its gradients right, and does it live through lost clients, full memory and overload?"""

from __future__ import annotations

import base64
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

import host_model
from host_model import DEVICE, Shape

from fednano.host import HostLimits, RunningHost
from fednano.host.drive import Driven, Drivers, Load, batch_of
from fednano.models.language import LocalLLM

WRONG = 0.2
"""Relative difference from which a gradient counts as wrong. Those of two other samples differ by 1.4; rounding to
bfloat16 in batches of another shape makes a few hundredths."""


def self_signed(folder: Path) -> tuple[bytes, bytes]:
    """PEM key and certificate for 127.0.0.1, valid for a day."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=127.0.0.1"
    subprocess.run(
        [
            *command.split(),
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            str(key),
            "-out",
            str(certificate),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return key.read_bytes(), certificate.read_bytes()


def pem(data: bytes) -> str:
    """As a `Load` carries it."""
    return base64.urlsafe_b64encode(data).decode()


def differences(llm: LocalLLM, shape: Shape, load: Load, folder: Path) -> list[float]:
    """Relative difference of each client's last gradient from that of a lone pass in this process."""
    found = []
    for client in range(len(load.lengths)):
        path = folder / f"{client}.safetensors"
        if not path.is_file():
            continue
        embeds, mask, labels = batch_of(llm.hidden_size, llm.vocab_size, load, client)
        _, gradient = llm.passes.compute(embeds.to(DEVICE), mask, labels, "cross_entropy", True)
        assert gradient is not None
        there, here = load_file(path)["gradient"].float(), gradient.float().cpu()
        found.append(float((there - here).norm() / here.norm()))
    return found


def checked(drivers: Drivers, llm: LocalLLM, shape: Shape, load: Load) -> tuple[Driven, list[float]]:
    """Run a load and compare every client's gradient."""
    with tempfile.TemporaryDirectory() as folder:
        kept = replace(load, keep_gradients=folder)
        driven = drivers.run(kept)
        return driven, differences(llm, shape, kept, Path(folder))


def quiet(host: RunningHost, seconds: float = 30.0) -> bool:
    """Whether the host comes to hold nothing of any client."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stats = host.stats()
        if not any(stats.get(name, 0) for name in ("in_flight", "buffered_bytes", "waiting")):
            return True
        time.sleep(0.05)
    return False


def correctness(drivers: Drivers, llm: LocalLLM, shape: Shape, load: Load, clients: int) -> dict[str, Any]:
    """Many clients with lengths of their own; every gradient against a lone pass."""
    low, high = shape.lengths[0] // 2, shape.lengths[2]
    generator = torch.Generator().manual_seed(5)
    lengths = tuple(torch.randint(low, high + 1, (clients,), generator=generator).tolist())
    return compared(
        drivers, llm, shape, replace(load, lengths=lengths, steps=2), f"{clients} clients with random lengths"
    )


def compared(drivers: Drivers, llm: LocalLLM, shape: Shape, load: Load, name: str) -> dict[str, Any]:
    """Each client's last gradient against a lone pass."""
    driven, found = checked(drivers, llm, shape, replace(load, seconds=0.0, seed=9_000))
    return {
        "section": "fault",
        "name": name,
        "errors": len(driven.errors) + driven.unavailable,
        "compared": len(found),
        "wrong": sum(not value < WRONG for value in found),
        "largest_difference": max(found, default=0.0),
        "notes": driven.errors[:3],
    }


def client_gone(
    host: RunningHost, drivers: Drivers, llm: LocalLLM, shape: Shape, load: Load
) -> dict[str, Any]:
    """Clients are killed in mid-step while others go on."""
    host_model.settle()
    base = host_model.allocated()
    rude_load = replace(load, lengths=(shape.lengths[2],) * 8, seconds=600.0)
    with Drivers(2) as rude:
        rude.start(rude_load)
        until = time.monotonic() + 20
        while host.stats().get("in_flight", 0) < 4 and time.monotonic() < until:
            time.sleep(0.002)
        held = host.stats()["in_flight"]
        rude.kill()
    driven, found = checked(drivers, llm, shape, replace(load, lengths=(shape.lengths[1],) * 4, seconds=1.0))
    still = quiet(host)
    host_model.settle()
    return {
        "section": "fault",
        "name": "eight clients killed in mid-step",
        "errors": len(driven.errors) + driven.unavailable + (not still),
        "compared": len(found),
        "wrong": sum(not value < WRONG for value in found),
        "in_flight_when_killed": held,
        "cancelled": host.stats().get("cancelled", 0),
        "memory_over_base": host_model.allocated() / base if base else 1.0,
        "notes": driven.errors[:3],
    }


def out_of_memory(
    host: RunningHost, drivers: Drivers, llm: LocalLLM, shape: Shape, load: Load
) -> dict[str, Any] | None:
    """Others take nearly all memory of the card; steps are refused or go in small parts; then it comes back."""
    if DEVICE.type != "cuda":
        return None
    host_model.settle()
    base = host_model.allocated()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(free - int(1.2e9), 0), dtype=torch.uint8, device=DEVICE)
    hard = replace(load, lengths=(shape.lengths[2],) * 8, samples=2, seconds=4.0, steps=1, retry_seconds=1.0)
    with tempfile.TemporaryDirectory() as folder:
        hard = replace(hard, keep_gradients=folder)
        during = drivers.run(hard)
        del ballast
        host_model.settle()
        # Compared with passes that had all the memory: parts and checkpoints must not change a gradient.
        found = differences(llm, shape, hard, Path(folder))
    after, found_after = checked(
        drivers, llm, shape, replace(load, lengths=(shape.lengths[2],) * 4, seconds=1.0)
    )
    found += found_after
    still = quiet(host)
    host_model.settle()
    return {
        "section": "fault",
        "name": "1.2 GB free beside the model",
        "errors": len(after.errors) + after.unavailable + (not still),
        "answered_meanwhile": sum(map(len, during.steps)),
        "given_up_meanwhile": during.unavailable + len(during.errors),
        "compared": len(found),
        "wrong": sum(not value < WRONG for value in found),
        "refused_busy": host.stats().get("refused_busy", 0),
        "largest_difference": max(found, default=0.0),
        "batches_split": host.stats().get("batches_split", 0),
        "memory_over_base": host_model.allocated() / base if base else 1.0,
        "notes": [*during.errors[:2], *after.errors[:2]],
    }


def overload(
    serve: Callable[..., Any],
    drivers: Drivers,
    llm: LocalLLM,
    shape: Shape,
    load: Callable[[RunningHost], Load],
    seconds: float,
) -> dict[str, Any]:
    """Ten times the clients that a host takes on, each asking again at once."""
    clients, taken = 60, 6
    host_model.settle()
    base = host_model.allocated()
    with serve(limits=HostLimits(max_requests=taken)) as host:
        one = replace(
            load(host), lengths=(shape.lengths[1],) * clients, seconds=seconds, retry_seconds=seconds
        )
        driven, found = checked(drivers, llm, shape, one)
        still = quiet(host)
        refused = host.stats().get("refused_busy", 0)
    host_model.settle()
    return {
        "section": "fault",
        "name": f"{clients} clients where {taken} are taken on, {seconds:.0f} s",
        "errors": len(driven.errors) + (not still),
        "answered": sum(map(len, driven.steps)),
        "given_up": driven.unavailable,
        "refused_busy": refused,
        "p99_ms": 1000 * driven.latency(0.99),
        "compared": len(found),
        "wrong": sum(not value < WRONG for value in found),
        "memory_over_base": host_model.allocated() / base if base else 1.0,
        "notes": driven.errors[:3],
    }
