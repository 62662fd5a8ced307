"""The command line of a host: ``python -m fednano.host --model NAME --listen HOST:PORT``.

When it serves, it prints one line of JSON on stdout: ``{"address", "fingerprint", "pid", "tls"}``. SIGTERM and SIGINT
drain it: no new calls, those under way may end. A bad option or a taken port ends it with status 2 and a message.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fednano.errors import ConfigError, FednanoError
from fednano.host.limits import HostLimits
from fednano.host.security import HostSecurity, RunTokens, StaticTokens

if TYPE_CHECKING:
    from fednano.models.language import LanguagePart, LocalLLM

__all__ = ["Loader", "main"]

Loader: TypeAlias = "Callable[[str, str, str], LanguagePart]"
"""Loads the language part from a model's name, a dtype's name and a device."""

_DTYPES = ("float32", "bfloat16", "float16")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fednano host",
        description="Serve the frozen language half of a model to the clients of a run.",
        epilog="Without --tls-cert the host listens on loopback addresses only. "
        "`fednano host bench` measures a host instead; see `fednano host bench --help`.",
    )
    limits = HostLimits()
    add = parser.add_argument
    add("--model", required=True, help="'tiny', a folder, or a Hugging Face id")
    add(
        "--listen",
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        help="port 0 takes a free one (%(default)s)",
    )
    add("--dtype", choices=_DTYPES, default="float32", help="type of weights and arithmetic (%(default)s)")
    add("--device", default="cpu", help="'cpu', 'cuda', 'cuda:1', ... (%(default)s)")
    add("--workers", type=int, default=1, help="computations at one time (%(default)s)")
    add("--threads", type=int, default=None, help="torch threads of each computation (torch's default)")
    add(
        "--batch-tokens",
        type=int,
        default=None,
        metavar="N",
        help="most tokens of a batch of several clients' steps; 0: each alone, and then the bits of a reply depend on "
        "its request alone (8192 on a GPU, 0 on a CPU)",
    )
    add(
        "--linger-ms",
        type=float,
        default=None,
        metavar="MS",
        help="longest wait of a small step for other clients' (10 on a GPU, 0 on a CPU)",
    )
    add("--compile", action="store_true", help="compile the model's blocks at start (about a minute)")
    add(
        "--memory-gb",
        type=float,
        default=None,
        metavar="GB",
        help="most memory of the GPU, model included; larger batches go in parts (all there is)",
    )
    add(
        "--keep-bytes",
        type=int,
        default=2 << 30,
        help="memory for samples of the factored exchange (%(default)s)",
    )
    add(
        "--keep-graphs",
        type=int,
        default=8,
        help="label-private steps that wait with their graphs; others are computed again (%(default)s)",
    )
    add("--keep-disk-bytes", type=int, default=0, help="temporary files for more of them (%(default)s)")
    add("--tls-cert", type=Path, metavar="PEM", help="certificate chain of this host")
    add("--tls-key", type=Path, metavar="PEM", help="its private key")
    add("--client-ca", type=Path, metavar="PEM", help="admit only clients with a certificate signed by these")
    add(
        "--server",
        type=Path,
        metavar="DIR",
        help="folder of a federation's server, which holds certificates and the key of run tokens",
    )
    add("--token-file", type=Path, metavar="FILE", help="admitted tokens, one base64url text a line")
    add("--max-batch", type=int, default=limits.max_batch, help="samples of a request (%(default)s)")
    add(
        "--max-tokens",
        type=int,
        default=limits.max_tokens,
        help="samples x longest, of a request (%(default)s)",
    )
    add("--max-new-tokens", type=int, default=limits.max_new_tokens, help="tokens of an answer (%(default)s)")
    add("--max-request-bytes", type=int, default=limits.max_request_bytes, help="of tensors (%(default)s)")
    add("--max-requests", type=int, default=limits.max_requests, help="taken on at one time (%(default)s)")
    add(
        "--max-buffered-bytes", type=int, default=limits.max_buffered_bytes, help="of all those (%(default)s)"
    )
    add(
        "--idle-seconds",
        type=float,
        default=limits.idle_seconds,
        help="wait for a silent client (%(default)s)",
    )
    add(
        "--slowest-bytes",
        type=int,
        default=limits.slowest_bytes,
        help="a second, that a request must come at (%(default)s)",
    )
    add("--grace", type=float, default=10.0, help="seconds for calls under way when stopped (%(default)s)")
    add(
        "--metrics",
        default="",
        metavar="HOST:PORT",
        help="serve counters for Prometheus at http://HOST:PORT/metrics",
    )
    add("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"), help="(%(default)s)")
    add(
        "--managed",
        action="store_true",
        help="read settings from stdin, and stop when stdin ends (for programs)",
    )
    return parser


def main(argv: Sequence[str] | None = None, load: Loader | None = None) -> int:
    """Run a host until a signal ends it.

    Args:
        argv: arguments without the program's name; ``None`` takes those of the process.
        load: loads the model; ``None`` takes `fednano.models.load_language`.

    Returns:
        The exit status: 0 after a clean stop, 2 for a mistake of the caller (told on stderr).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:
        from fednano.host.bench import main as bench

        return bench(words[1:])
    options = _parser().parse_args(words)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = _StopSwitch()
    try:
        tokens = _managed_tokens(stop) if options.managed else []
        limits = HostLimits(**{field.name: getattr(options, field.name) for field in fields(HostLimits)})
        security = _security(options, tokens)
        security.credentials(options.listen)  # a mistake here is told before minutes of loading
        part = (load or _load)(options.model, options.dtype, options.device)
        asyncio.run(_serve(options, part, security, limits, stop))
    except (FednanoError, OSError) as error:
        print(f"fednano host: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # Ctrl-C before the server took over the signal
        return 130
    return 0


def _batch_tokens(options: argparse.Namespace) -> int:
    """What was asked, or a default for the device: on a CPU the passes of small batches gain nothing."""
    if options.batch_tokens is not None:
        return int(options.batch_tokens)
    return 8192 if str(options.device).startswith("cuda") else 0


def _linger_seconds(options: argparse.Namespace) -> float:
    if options.linger_ms is not None:
        return float(options.linger_ms) / 1000
    return 0.01 if str(options.device).startswith("cuda") else 0.0


def _model(options: argparse.Namespace, part: LanguagePart) -> LocalLLM:
    """The model, ready to compute: a host that says it serves answers its first step as fast as its hundredth."""
    import torch

    from fednano.models.language import LocalLLM
    from fednano.models.memory import DeviceMemory

    device = torch.device(options.device)
    memory = None
    if options.memory_gb is not None:
        if device.type != "cuda" or not options.memory_gb > 0:
            raise ConfigError(
                f"--memory-gb: got {options.memory_gb:g} on {options.device}; expected a number above 0, on a GPU"
            )
        memory = DeviceMemory(device, int(options.memory_gb * 1e9))
    llm = LocalLLM(part, compiled=options.compile, memory=memory)
    if options.compile or device.type == "cuda":
        llm.passes.warm_up()
    return llm


async def _serve(
    options: argparse.Namespace,
    part: LanguagePart,
    security: HostSecurity,
    limits: HostLimits,
    stop: _StopSwitch,
) -> None:
    from fednano.host.kept import KeptSamples
    from fednano.host.server import HostServer

    server = HostServer(
        _model(options, part),
        listen=options.listen,
        security=security,
        limits=limits,
        workers=options.workers,
        threads=options.threads,
        batch_tokens=_batch_tokens(options),
        linger_seconds=_linger_seconds(options),
        kept=KeptSamples(options.keep_bytes, options.keep_disk_bytes),
        keep_graphs=options.keep_graphs,
    )
    with ExitStack() as stack:
        metrics = ""
        if options.metrics:
            from fednano.host.metrics import serve_metrics

            metrics = stack.enter_context(serve_metrics(options.metrics, server.counters))
        address = await server.start()
        ended = stop.attach(asyncio.get_running_loop())
        ready = {"address": address, "fingerprint": part.fingerprint, "pid": os.getpid(), "tls": security.tls}
        print(json.dumps(ready | ({"metrics": metrics} if metrics else {})), flush=True)
        await ended.wait()
        await server.stop(options.grace)


class _StopSwitch:
    """Ends the host: before the server runs, by leaving at once; after that, by draining it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> asyncio.Event:
        """The event that is set when the host shall end; signals set it from now on."""
        with self._lock:
            self._loop, self._ended = loop, asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                loop.add_signal_handler(number, self._ended.set)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda *_: self.end())
        return self._ended

    def end(self) -> None:
        """Callable from any thread."""
        with self._lock:
            if self._loop is None or self._ended is None:
                os._exit(0)  # still loading the model: nothing to drain
            self._loop.call_soon_threadsafe(self._ended.set)


def _managed_tokens(stop: _StopSwitch) -> list[bytes]:
    """Read the settings of a managing program, then watch for the end of stdin, which is the end of that program.

    A pipe sees the end of its other side however that came about; a death signal would be bound to a thread.
    """
    line = sys.stdin.buffer.readline()
    if not line:
        raise ConfigError("--managed: stdin ended before the settings came")
    tokens = [base64.urlsafe_b64decode(text) for text in json.loads(line)["tokens"]]

    def watch() -> None:
        # The descriptor itself: a thread blocked inside sys.stdin would hold its lock against the interpreter's end.
        while os.read(sys.stdin.fileno(), 4096):
            pass
        stop.end()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    return tokens


def _security(options: argparse.Namespace, tokens: list[bytes]) -> HostSecurity:
    if options.server is not None:
        from fednano.security.place import ServerPlace

        if tokens or options.token_file or options.tls_cert or options.tls_key or options.client_ca:
            raise ConfigError("--server brings certificates and tokens; leave the other options for them out")
        place = ServerPlace(options.server)
        own = place.credentials
        return HostSecurity(own.certificate, own.key, own.root, RunTokens.of_place(place))
    if options.token_file is not None:
        lines = options.token_file.read_text().split()
        try:
            tokens = tokens + [base64.b64decode(line, altchars=b"-_", validate=True) for line in lines]
        except ValueError:
            raise ConfigError(f"{options.token_file}: expected one base64url text a line") from None
        if not tokens:
            raise ConfigError(f"{options.token_file}: no token in it; nobody could call this host")
    return HostSecurity(
        certificate=options.tls_cert.read_bytes() if options.tls_cert else None,
        key=options.tls_key.read_bytes() if options.tls_key else None,
        client_ca=options.client_ca.read_bytes() if options.client_ca else None,
        verifier=StaticTokens(tokens) if tokens else None,
    )


def _load(name: str, dtype: str, device: str) -> LanguagePart:
    import torch

    from fednano.models.load import load_language

    return load_language(name, dtype=getattr(torch, dtype), device=device)
