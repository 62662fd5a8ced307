"""Children that are kept alive, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fednano.deploy.node import owned, read_status
from fednano.deploy.supervise import Child
from fednano.errors import ConfigError
from fednano.runs.atomic import write_json

SLEEP = "import time; time.sleep(600)"


def wait(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def child(tmp_path: Path, code: str, clock: list[float] | None = None) -> Child:
    now = (lambda: clock[0]) if clock is not None else time.monotonic
    return Child("child", [sys.executable, "-c", code], tmp_path / "child.log", now=now)


def test_a_killed_child_starts_again_after_a_pause_that_grows(tmp_path: Path) -> None:
    clock = [0.0]
    one = child(tmp_path, SLEEP, clock)
    assert "started" in one.tend()
    for pause in (0.5, 1, 2):
        first = one.pid
        os.kill(first, signal.SIGKILL)
        wait(lambda: not one.pid)
        assert f"ended with status -9; it starts again in {pause:g} s" in one.tend()
        assert not one.pid
        clock[0] += pause - 0.01
        one.tend()
        assert not one.pid
        clock[0] += 0.02
        one.tend()
        assert one.pid not in (0, first)
    assert one.restarts == 3
    clock[0] += 61  # it has recovered
    os.kill(one.pid, signal.SIGKILL)
    wait(lambda: not one.pid)
    assert "again in 0.5 s" in one.tend()
    one.stop()


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_what_a_child_started_ends_with_it(tmp_path: Path, how: str) -> None:
    code = (
        "import subprocess, sys, time, pathlib; "
        f"p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True); "
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid)); time.sleep(600)"
    )
    one = child(tmp_path, code)
    one.tend()
    wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    grandchild = int((tmp_path / "pid").read_text())
    assert alive(grandchild)
    if how == "stopped":
        one.stop()
    else:
        os.kill(one.pid, signal.SIGKILL)
        wait(lambda: not one.pid)
        one.tend()
    assert not alive(grandchild)
    one.stop()


def test_a_child_that_will_not_end_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "ready"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    code = f"{deaf}; open({str(mark)!r}, 'w'); {SLEEP}"
    one = child(tmp_path, code)
    one.tend()
    wait(mark.exists)
    pid = one.pid
    one.stop(seconds=0.2)
    assert not alive(pid)


def test_a_child_that_says_that_it_is_lost_is_started_again(tmp_path: Path) -> None:
    log, word = tmp_path / "child.log", tmp_path / "word"
    code = (
        "import pathlib, sys, time\n"
        "print('Ignoring reply', flush=True)\n"
        f"while not pathlib.Path({str(word)!r}).exists(): time.sleep(0.02)\n"
        "print('Ignoring mess', end='', flush=True); time.sleep(0.3); print('age 7', flush=True)\n"
        f"{SLEEP}"
    )
    one = Child("child", [sys.executable, "-c", code], log, ailing="Ignoring message ")
    one.tend()
    wait(lambda: log.exists() and "reply" in log.read_text())
    first = one.pid
    assert one.tend() == "", "other words change nothing"
    word.touch()
    said = ""
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        said = one.tend()
    assert "is started again" in said
    assert not alive(first)
    word.unlink()
    assert "started, process" in one.tend()
    assert one.pid not in (0, first)
    assert one.tend() == "", "what the process before said is not held against it"
    one.stop()


def test_what_a_child_says_is_kept(tmp_path: Path) -> None:
    one = child(tmp_path, "print('hello'); raise SystemExit('bad')")
    one.tend()
    wait(lambda: not one.pid)
    assert "child.log" in one.tend()
    assert (tmp_path / "child.log").read_text() == "hello\nbad\n"


def test_a_folder_has_one_holder_and_what_a_killed_one_left_is_ended(tmp_path: Path) -> None:
    left = child(tmp_path, SLEEP)
    left.tend()
    write_json(tmp_path / "marks.json", [left.mark])
    pid = left.pid
    with owned(tmp_path):
        assert not alive(pid)
        with pytest.raises(ConfigError, match="running already"), owned(tmp_path):
            pass
    with owned(tmp_path):
        pass
    left.stop()


def test_the_status_of_a_dead_process_is_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_json(tmp_path / "status.json", {"pid": os.getpid()})
    assert read_status(tmp_path) == {"pid": os.getpid()}
    write_json(tmp_path / "status.json", {"pid": 2**22 + 1})
    assert read_status(tmp_path) is None


def test_a_second_signal_does_not_leave_children_behind(tmp_path: Path) -> None:
    slow = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), exit(0))); time.sleep(600)"
    code = (
        "import sys, pathlib; from fednano.deploy.node import keep_up; from fednano.deploy.supervise import Child; "
        f"folder = pathlib.Path({str(tmp_path)!r}); "
        f"keep_up(folder, [Child('slow', [sys.executable, '-c', {slow!r}], folder / 'log')], lambda _: {{}})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    wait(lambda: (read_status(tmp_path) or {}).get("processes", [{"pid": 0}])[0]["pid"], 60)
    time.sleep(1)
    status = read_status(tmp_path)
    assert status is not None
    pid = status["processes"][0]["pid"]
    for _ in range(3):
        process.terminate()
        time.sleep(0.1)
    assert process.wait(60) == 0
    assert not alive(pid)


def test_flower_still_says_what_is_waited_for() -> None:
    """The words stand in Flower's source as a format, with the run before and the message behind them."""
    import inspect

    from flwr.supernode import start_client_internal

    from fednano.deploy.client import _BEHIND

    assert f'"Run ID %s {_BEHIND}%s."' in inspect.getsource(start_client_internal)
