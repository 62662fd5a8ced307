"""The metrics log under threads, kills and full disks."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fednano.errors import RunError
from fednano.runs import RunFolder
from fednano.runs.metrics import JsonLines, read_json_lines

RECORD = {"phase": "federated", "round": 1, "scope": "global"}


def test_round_trip(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x")
    assert run.metrics() == []
    run.append_metrics(RECORD | {"loss": 0.5, "bytes": {"adapter_up": 3}})
    run.append_metrics(RECORD | {"scope": "client", "client": "0", "refused": "line\nbreak ü"})
    run.append_metrics(RECORD | {"loss": math.nan, "accuracy": math.inf, "seconds": 1.0})
    assert run.metrics() == [
        RECORD | {"loss": 0.5, "bytes": {"adapter_up": 3}},
        RECORD | {"scope": "client", "client": "0", "refused": "line\nbreak ü"},
        RECORD | {"loss": None, "accuracy": None, "seconds": 1.0, "non_finite": ["accuracy", "loss"]},
    ]
    assert len((run.path / "metrics.jsonl").read_bytes().splitlines()) == 3
    run.append_event("warning", "x")
    assert [(e["level"], e["text"]) for e in run.events()] == [("warning", "x")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": ""}, "'phase'"),
        ({"phase": None}, "'phase'"),
        ({"round": -1}, "'round'"),
        ({"round": 1.0}, "'round'"),
        ({"round": True}, "'round'"),
        ({"scope": "all"}, "'scope'"),
        ({"scope": "client"}, "'client'"),
        ({"scope": "client", "client": 3}, "'client'"),
        ({"loss": {1, 2}}, "Cannot write"),
    ],
)
def test_records_that_cannot_be_placed(change: dict[str, object], message: str, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x")
    with pytest.raises(RunError, match=message):
        run.append_metrics(RECORD | change)
    assert run.metrics() == []


def test_threads_do_not_tear_lines(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")

    def write(thread: int) -> None:
        for number in range(200):
            log.append({"thread": thread, "number": number, "text": "x" * 500})

    threads = [threading.Thread(target=write, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    rows = read_json_lines(tmp_path / "m.jsonl")
    assert len(rows) == 1200
    for k in range(6):
        assert [row["number"] for row in rows if row["thread"] == k] == list(range(200))


WRITER = """
import os, sys, threading
from pathlib import Path
from fednano.runs.metrics import JsonLines
log, going = JsonLines(Path(sys.argv[1])), threading.Barrier(3)
def write(k):
    for n in range(2_000_000):
        log.append({"thread": k, "number": n, "text": "y" * 3000})
        if n == 5 and going.wait() == 0: print("going", flush=True)
        if n > 5 and os.getppid() != parent: return  # nobody is left to kill it
parent = os.getppid()
for k in range(3): threading.Thread(target=write, args=(k,)).start()
"""


def test_kill_9_leaves_at_most_one_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    total = 0
    for _ in range(2):  # the second writer goes on where the first was killed
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "going\n"
            time.sleep(0.05)
            assert process.poll() is None
        finally:
            process.kill()
            process.communicate()
        rows = read_json_lines(path)  # every line but a torn last one is whole, or this raises
        assert len(rows) > total
        total = len(rows)
    by_thread = [[row["number"] for row in rows if row["thread"] == k] for k in range(3)]
    assert all(numbers for numbers in by_thread)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_line_is_skipped_and_cut_off(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = JsonLines(path)
    log.append({"n": 1})
    log.append({"n": 22222})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    assert read_json_lines(path) == [{"n": 1}]
    log.append({"n": 3})
    log.close()
    assert read_json_lines(path) == [{"n": 1}, {"n": 3}]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(RunError, match="line 2 is damaged"):
        read_json_lines(path)
    path.write_bytes(b'{"n": 1}\n[2]\n')
    with pytest.raises(RunError, match="line 2 is damaged: expected an object"):
        read_json_lines(path)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX thing")
def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = JsonLines(path)
    log.append({"text": "a" * 1000})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(RunError, match=r"needed [\d,]+ bytes.*Free space"):
            log.append({"text": "b" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes().endswith(b"\n")
    assert [row["text"][0] for row in read_json_lines(path)] == ["a"]
    log.append({"text": "c"})
    assert [row["text"][0] for row in read_json_lines(path)] == ["a", "c"]


def test_a_line_is_in_the_system_hands_at_once(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    log.append({"n": 1})
    with (tmp_path / "m.jsonl").open("rb") as other:
        assert json.loads(other.read()) == {"n": 1}
    assert (tmp_path / "m.jsonl").stat().st_size == 9
