"""Workers that kill themselves with SIGKILL before their Nth durable step.

Reads lines ``FOLDER N ACTION`` (N = 0: not at all), runs each in a process of its own, forked so that the imports are
paid once, and prints how it ended: a signal's number, or minus the number of steps that it took.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from job_world import FakeRunner, World

from fednano.unlearning.jobs.commit import roll_back
from fednano.unlearning.jobs.work import work

MOMENTS = ("os.rename", "os.truncate", "os.remove")


class Countdown:
    def __init__(self, last: int) -> None:
        self.last, self.steps = last, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: str, last: int, action: str) -> None:
    world = World(Path(folder), fresh=False)
    signer = world.server
    count, connect = Countdown(last), sqlite3.connect

    class Watched(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            if sql == "COMMIT" and self.total_changes:
                count.step()
            return super().execute(sql, *arguments)

    sqlite3.connect = lambda *a, **k: connect(*a, **{**k, "factory": Watched})  # type: ignore[assignment]
    # A file that is written whole ends in a rename, a log line begins with cutting off what is torn.

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if (event in MOMENTS and not str(arguments[0]).endswith(".tmp")) or event == "os.rename":
            count.step()

    sys.addaudithook(audit)
    if action == "rollback":
        roll_back(world.desk, "u0001", signer, actor="test", reason="")
    else:
        work(world.desk, FakeRunner(), signer)
    (Path(folder) / "steps").write_text(str(count.steps))


def main() -> None:
    for line in sys.stdin:
        folder, last, action = line.split()
        child = os.fork()
        if child == 0:
            run(folder, int(last), action)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status if status else (Path(folder) / "steps").read_text(), flush=True)


if __name__ == "__main__":
    main()
