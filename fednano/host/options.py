"""The options of ``fednano host``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fednano.host.limits import HostLimits
from fednano.host.logs import FORMATS

__all__ = ["parser"]

_DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """Reads the command line."""
    found = argparse.ArgumentParser(
        prog="fednano host",
        description="Serve the frozen language half of a model to the clients of a run.",
        epilog="Without --tls-cert the host listens on loopback addresses only. "
        "`fednano host bench` measures a host instead; see `fednano host bench --help`.",
    )
    limits = HostLimits()
    add = found.add_argument
    add("--model", required=True, help="'tiny', a folder, or a Hugging Face id")
    add(
        "--listen",
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        help="port 0 takes a free one (%(default)s)",
    )
    add("--dtype", choices=_DTYPES, default="float32", help="type of weights and arithmetic (%(default)s)")
    add(
        "--weights",
        default="",
        choices=("bf16", "int8", "int4"),
        help="of the decoder's linear layers; int8 and int4 by bitsandbytes, with arithmetic in --dtype (as --dtype)",
    )
    add("--device", default="cpu", help="'cpu', 'cuda', 'cuda:1', ... (%(default)s)")
    add(
        "--device-map",
        default="",
        metavar="WHERE",
        help="lay the model over several GPUs, as a pipeline: 'auto' (by free memory), 'balanced', or cuda:0,cuda:1",
    )
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
        help="longest wait of a small step for other clients' (30 on a GPU, 0 on a CPU)",
    )
    add("--compile", action="store_true", help="compile the model's blocks at start (about a minute)")
    add(
        "--cuda-graphs",
        action="store_true",
        help="record passes of sizes that come often, and tell the GPU each in one call; takes memory (see the docs)",
    )
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
    add("--keep-gpu-bytes", type=int, default=0, help="the GPU's memory for those used last (%(default)s)")
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
    add("--log-format", default="text", choices=FORMATS, help="of lines on stderr (%(default)s)")
    add("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"), help="(%(default)s)")
    add(
        "--managed",
        action="store_true",
        help="read settings from stdin, and stop when stdin ends (for programs)",
    )
    return found
