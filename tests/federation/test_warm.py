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
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fednano.errors import FednanoError, RunError
from fednano.federation.config import RunConfig
from fednano.federation.kept import keeping
from fednano.federation.messages import HostTicket, Instruction, Reply, tombstone_record
from fednano.federation.warm import forward, serve
from fednano.runs.tombstones import Tombstones


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


def request(**changes: Any) -> RecordDict:
    """A request to train, as it arrives; ``token`` is the host's."""
    ticket = HostTicket("host:1", changes.pop("token", b"first"))
    given: dict[str, Any] = {"round": 2, "accepted": 1, "leaves": {"text.A": torch.ones(2, 3)}} | changes
    instruction = Instruction(RunConfig(), "federated", ticket=ticket, pool=False, advice={}, **given)
    return recorddict_from_proto(recorddict_to_proto(instruction.to_records()))


def test_a_request_that_comes_again_is_answered_by_the_same_answer() -> None:
    trained: list[int] = []

    def perform(task: str, content: RecordDict, node: dict[str, Any], began: float) -> RecordDict:
        asked = Instruction.from_records(content)
        trained.append(asked.round)
        if asked.round == 9:
            return Reply.failed("site-a", 9, FednanoError("out of memory")).to_records()
        return Reply("site-a", asked.round, {"samples": len(trained)}, {}, asked.leaves).to_records()

    answer, site = keeping(perform), {"site": "site-a"}
    first = answer("train", request(), site, 0.0)
    assert answer("train", request(token=b"fresh"), site, 1.0) is first
    assert trained == [2]
    others: list[dict[str, Any]] = [
        {"round": 3},
        {"accepted": 0},
        {"leaves": {"text.A": torch.zeros(2, 3)}},
        {"run": "another"},
        {"secure": {"stage": "masked", "session": b"s"}},
    ]
    for changes in others:
        assert answer("train", request(**changes), site, 0.0) is not first
    forgetful = request()
    forgetful["tombstones"] = tombstone_record(Tombstones())
    assert answer("train", forgetful, site, 0.0) is not first
    assert answer("train", request(), {"site": "site-b"}, 0.0) is not first
    assert len(trained) == 8
    answer("train", request(), site, 0.0)  # only the last is kept
    assert len(trained) == 9
    for _ in range(2):
        answer("train", request(round=9), site, 0.0)
    assert trained[-2:] == [9, 9]  # an error is not
    for _ in range(2):
        answer("evaluate", request(), site, 0.0)
    assert len(trained) == 13
