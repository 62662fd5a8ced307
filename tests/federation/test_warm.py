"""The warm worker: the same answers as in the process itself, whoever dies in between."""

from __future__ import annotations

import contextlib
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fednano.errors import RunError
from fednano.federation.warm import forward, serve


@contextlib.contextmanager
def worker(path: Path) -> Iterator[list[tuple[Any, ...]]]:
    """A worker on a thread that echoes; ends with the test's process."""
    seen: list[tuple[Any, ...]] = []

    def perform(task: str, content: RecordDict, node: dict[str, Any], began: float) -> RecordDict:
        seen.append((task, node, began))
        if task == "slow":
            time.sleep(0.3)
        if task == "broken":
            raise ZeroDivisionError("a defect")
        content["seen"] = MetricRecord({"count": len(seen)})
        return content

    threading.Thread(target=serve, args=(path, perform), daemon=True).start()
    while not path.exists():
        time.sleep(0.01)
    yield seen


def content(size: int = 10) -> RecordDict:
    return RecordDict({"config": ConfigRecord({"text": "ä", "blob": b"x" * size, "numbers": [1, 2]})})


def test_what_comes_back_is_what_was_sent(tmp_path: Path) -> None:
    path = tmp_path / "state" / "worker.sock"
    node = {"site": "site-a", "partition-id": 3}
    with worker(path) as seen:
        for size in (0, 3_000_000):
            reply = forward(str(path), "train", content(size), node)
            assert reply["config"] == content(size)["config"]
        assert [task for task, _, _ in seen] == ["train", "train"]
        assert seen[0][1] == node
        assert 0 < time.time() - seen[0][2] < 3600  # when this process began
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_damaged_and_cut_off_requests_do_not_end_it(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    with worker(path):
        whole = struct.Struct("<Q").pack
        for junk in (b"", b"abc", whole(1 << 40), whole(10) + b"x" * 5, whole(3) + b"\xff\xff\xff"):
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(str(path))
                line.sendall(junk)
        with pytest.raises(RunError, match="ZeroDivisionError: a defect"):
            forward(str(path), "broken", content(), {})
        assert "seen" in forward(str(path), "train", content(), {})


def test_a_caller_that_left_does_not_end_it(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    code = (
        "import sys; from flwr.app import RecordDict; from fednano.federation.warm import forward; "
        "forward(sys.argv[1], 'slow', RecordDict(), {})"
    )
    with worker(path) as seen:
        process = subprocess.Popen([sys.executable, "-c", code, str(path)])
        while not seen:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert "seen" in forward(str(path), "train", content(), {})


def test_a_worker_that_starts_late_or_anew_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    with pytest.raises(RunError, match=r"does not answer .*worker\.log"):
        forward(str(path), "train", content(), {}, patience=0.2)
    # One that dies in the middle of a request ...
    dying = socket.socket(socket.AF_UNIX)
    dying.bind(str(path))
    dying.listen(1)

    def die() -> None:
        line, _ = dying.accept()
        line.recv(10)
        line.close()
        dying.close()
        with worker(path):  # ... and its successor
            pass

    threading.Thread(target=die, daemon=True).start()
    assert "seen" in forward(str(path), "train", content(), {}, patience=20)


def test_passing_a_message_on_loads_no_torch() -> None:
    code = "import sys, fednano.federation.apps, fednano.federation.warm; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
