"""The command line of a host: ``python -m fednano.host --model NAME --listen HOST:PORT``.

When it serves, it prints one line of JSON on stdout: ``{"address", "fingerprint", "pid", "tls"}``. SIGTERM and SIGINT
drain it: no new calls, those under way may end. A bad option or a taken port ends it with status 2 and a message.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import TYPE_CHECKING

from fednano.errors import ConfigError, FednanoError
from fednano.host.limits import HostLimits
from fednano.host.logs import configure
from fednano.host.options import parser
from fednano.host.security import HostSecurity, RunTokens, StaticTokens

if TYPE_CHECKING:
    from fednano.host.loading import Loader
    from fednano.models.language import LanguagePart

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, load: Loader | None = None) -> int:
    """Run a host until a signal ends it.

    Args:
        argv: arguments without the program's name; ``None`` takes those of the process.
        load: loads the model; see `fednano.host.loading.load_part`.

    Returns:
        The exit status: 0 after a clean stop, 2 for a mistake of the caller (told on stderr).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:
        from fednano.host.bench import main as bench

        return bench(words[1:])
    options = parser().parse_args(words)
    configure(options.log_format, options.log_level)
    stop = _StopSwitch()
    try:
        tokens = _managed_tokens(stop) if options.managed else []
        limits = HostLimits(**{field.name: getattr(options, field.name) for field in fields(HostLimits)})
        security = _security(options, tokens)
        security.credentials(options.listen)  # a mistake here is told before minutes of loading
        from fednano.host.loading import load_part

        part = load_part(options, load)
        asyncio.run(_serve(options, part, security, limits, stop))
    except (FednanoError, OSError) as error:
        print(f"fednano host: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # Ctrl-C before the server took over the signal
        return 130
    return 0


async def _serve(
    options: argparse.Namespace,
    part: LanguagePart,
    security: HostSecurity,
    limits: HostLimits,
    stop: _StopSwitch,
) -> None:
    from fednano.host.loading import batch_tokens, kept_samples, linger_seconds, make_model
    from fednano.host.server import HostServer

    server = HostServer(
        make_model(options, part),
        listen=options.listen,
        security=security,
        limits=limits,
        workers=options.workers,
        threads=options.threads,
        batch_tokens=batch_tokens(options, part),
        linger_seconds=linger_seconds(options, part),
        kept=kept_samples(options, part),
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
        from fednano.security.authority import require_valid
        from fednano.security.place import ServerPlace

        if tokens or options.token_file or options.tls_cert or options.tls_key or options.client_ca:
            raise ConfigError("--server brings certificates and tokens; leave the other options for them out")
        place = ServerPlace(options.server)
        own = place.credentials
        require_valid(own.certificate, "fednano deploy renew")
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
