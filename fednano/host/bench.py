"""``fednano host bench``: how many steps a second a host answers, for how many clients and tokens.

It starts a host of the model on this machine, or asks one that is running (``--address``), and prints a table.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from fednano.errors import ConfigError, FednanoError
from fednano.host.drive import Driven, Drivers, Load
from fednano.host.process import HostProcess, host_command
from fednano.host.security import new_token

__all__ = ["main", "row_of"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fednano host bench",
        description="Measure a language host: steps per second and latency against clients and tokens.",
        epilog="Options after -- go to the host that is started, such as: -- --device cuda --dtype bfloat16 --compile",
    )
    add = parser.add_argument
    add("--model", default="tiny", help="'tiny', a folder, or a Hugging Face id (%(default)s)")
    add("--address", metavar="HOST:PORT", help="measure this host instead of starting one")
    add("--ca", type=Path, metavar="PEM", help="certificates that signed that host's; plain text without")
    add("--token-file", type=Path, metavar="FILE", help="a token that it admits, base64url")
    add("--clients", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="(1 4 16)")
    add("--lengths", type=int, nargs="+", default=[32, 128], metavar="TOKENS", help="of a sample (32 128)")
    add("--samples", type=int, default=1, help="of a request (%(default)s)")
    add("--seconds", type=float, default=3.0, help="of each measurement (%(default)s)")
    add("--wire-dtype", default="float32", choices=("float32", "bfloat16", "float16", "int8"))
    add("--lossless", action="store_true", help="leave out what repeats itself on the wire, to the same bits")
    add("--processes", type=int, default=4, help="that play the clients (%(default)s)")
    add("--json", action="store_true", help="print rows of JSON instead of a table")
    add("host_options", nargs="*", help=argparse.SUPPRESS)
    return parser


def row_of(load: Load, found: Driven) -> dict[str, float]:
    """What a load showed, as one row of a table."""
    rate = found.rate()
    tokens = sum(load.lengths) / len(load.lengths) * load.samples
    return {
        "clients": len(load.lengths),
        "tokens": tokens,
        "steps_per_second": rate,
        "tokens_per_second": rate * tokens,
        "p50_ms": 1000 * found.latency(0.5),
        "p99_ms": 1000 * found.latency(0.99),
        "given_up": found.unavailable,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement.

    Args:
        argv: arguments without the program's name; ``None`` takes those of the process.

    Returns:
        The exit status: 0, 1 if steps failed, 2 for a mistake of the caller (told on stderr).
    """
    options = _parser().parse_args(argv)
    try:
        return _measure(options)
    except (FednanoError, OSError) as error:
        print(f"fednano host bench: {error}", file=sys.stderr)
        return 2


def _measure(options: argparse.Namespace) -> int:
    if min(*options.clients, *options.lengths, options.samples, options.processes, options.seconds) <= 0:
        raise ConfigError("clients, lengths, samples, processes and seconds are numbers above 0")
    failed = 0
    with ExitStack() as stack:
        if options.address:
            address, token = options.address, b""
            if options.token_file:
                token = base64.urlsafe_b64decode(options.token_file.read_text().strip())
        else:
            token = new_token()
            command = host_command(options.model, *options.host_options)
            address = stack.enter_context(HostProcess(command, tokens=[token], start_seconds=900.0)).address
        drivers = stack.enter_context(Drivers(min(options.processes, max(options.clients))))
        if not options.json:
            print(f"{'clients':>8}{'tokens':>8}{'steps/s':>10}{'tokens/s':>11}{'p50 ms':>9}{'p99 ms':>9}")
        for length in options.lengths:
            for clients in options.clients:
                wire = options.wire_dtype
                load = Load(
                    address,
                    (length,) * clients,
                    base64.urlsafe_b64encode(options.ca.read_bytes()).decode() if options.ca else "",
                    base64.urlsafe_b64encode(token).decode(),
                    seconds=options.seconds,
                    samples=options.samples,
                    dtype="float32" if wire == "int8" else wire,
                    wire=wire,
                    lossless=options.lossless,
                )
                found = drivers.run(load)
                row = row_of(load, found)
                for text in found.errors[:3]:
                    print(f"fednano host bench: {text}", file=sys.stderr)
                failed += len(found.errors)
                if options.json:
                    print(json.dumps(row), flush=True)
                    continue
                print(
                    f"{clients:>8}{row['tokens']:>8.0f}{row['steps_per_second']:>10.1f}"
                    f"{row['tokens_per_second']:>11.0f}{row['p50_ms']:>9.1f}{row['p99_ms']:>9.1f}",
                    flush=True,
                )
    return 1 if failed else 0
