"""A site's warm worker: one process that keeps models, features and connections from one message to the next.

Flower starts a process for each message. Importing torch, loading the model and encoding images there would come again
in every round, so `fednano client up` keeps this worker beside the SuperNode, and the process that Flower starts only
passes the message on. It speaks over a Unix socket in the site's own folder, which nobody else may open: a length and a
protobuf each way, one request at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError

from fednano.errors import RunError

__all__ = ["forward", "main", "serve"]

log = logging.getLogger(__name__)

_ENVELOPE = "fednano-envelope"
_LENGTH = struct.Struct("<Q")
_MOST_BYTES = 1 << 31
_PATIENCE_S = 120.0  # for a worker that is starting


def forward(
    path: str, task: str, content: RecordDict, node: Mapping[str, Any], *, patience: float = _PATIENCE_S
) -> RecordDict:
    """Have the worker at a socket perform a task.

    A worker that was killed meanwhile is started again by `fednano client up`; the request is then made once more. That
    is harmless: what a client remembers is written under the round's number.

    Args:
        path: of the socket.
        task: name of a function of `fednano.federation.client_task`.
        content: of the message.
        node: Flower's node configuration.
        patience: seconds to wait for a worker.

    Raises:
        RunError: no worker answered, or it failed at the task.
    """
    envelope = ConfigRecord({"task": task, "node": json.dumps(dict(node)), "began": _process_start()})
    request = RecordDict({**content, _ENVELOPE: envelope})
    body = recorddict_to_proto(request).SerializeToString()
    deadline, reason = time.monotonic() + patience, "there is no socket"
    while time.monotonic() < deadline:
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(path)
                _write(line, body)
                reply = recorddict_from_proto(ProtoRecordDict.FromString(_read(line)))
        except OSError as error:
            reason = str(error)
            time.sleep(0.05)
            continue
        if _ENVELOPE in reply.config_records:
            said = str(reply.config_records[_ENVELOPE]["error"])
            raise RunError(f"the site's worker failed: {said}. See worker.log.")
        return reply
    raise RunError(f"the site's worker at {path} does not answer ({reason}). See worker.log beside it.")


def serve(path: Path, perform: Callable[[str, RecordDict, dict[str, Any], float], RecordDict]) -> None:
    """Answer requests, one at a time, until the process is ended.

    Args:
        path: where to make the socket.
        perform: does a task: its name, its content, the node configuration, and when Flower's process for it began.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as door:
        before = os.umask(0o177)
        try:
            door.bind(str(path))
        finally:
            os.umask(before)
        door.listen(8)
        while True:
            line, _ = door.accept()
            # Whoever asked has gone, or sent no request.
            with line, contextlib.suppress(OSError, DecodeError, ValueError, KeyError):
                request = recorddict_from_proto(ProtoRecordDict.FromString(_read(line)))
                envelope: Any = request.config_records[_ENVELOPE]
                del request[_ENVELOPE]
                node = json.loads(envelope["node"])
                try:
                    reply = perform(envelope["task"], request, node, envelope["began"])
                except Exception as error:
                    log.exception("%s failed", envelope["task"])
                    told = ConfigRecord({"error": f"{type(error).__name__}: {error}"})
                    reply = RecordDict({_ENVELOPE: told})
                _write(line, recorddict_to_proto(reply).SerializeToString())


def main(argv: list[str] | None = None) -> None:
    """Entry point: ``python -m fednano.federation.warm --socket PATH``."""
    parser = argparse.ArgumentParser(prog="python -m fednano.federation.warm")
    parser.add_argument("--socket", type=Path, required=True)
    options = parser.parse_args(argv)
    from fednano.federation.kept import keeping
    from fednano.federation.tasks import carry_out

    serve(options.socket, keeping(carry_out))


def _process_start() -> float:
    """When this process began, in seconds since 1970; now, where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def _write(line: socket.socket, body: bytes) -> None:
    line.sendall(_LENGTH.pack(len(body)))
    line.sendall(body)


def _read(line: socket.socket) -> bytes:
    (size,) = _LENGTH.unpack(_exactly(line, _LENGTH.size))
    if size > _MOST_BYTES:
        raise OSError(f"a message of {size} bytes")
    return _exactly(line, size)


def _exactly(line: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        piece = line.recv(min(1 << 20, size - len(found)))
        if not piece:
            raise OSError("the other side has gone")
        found += piece
    return bytes(found)


if __name__ == "__main__":
    main()
