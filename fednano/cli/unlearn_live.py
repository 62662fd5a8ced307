"""`fednano unlearn run --superlink` and `--server`: have a run's queue worked on through connected SuperNodes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fednano.errors import ConfigError, RunError

if TYPE_CHECKING:
    from fednano.unlearning.jobs.desk import Desk
    from fednano.unlearning.jobs.job import Job

__all__ = ["run_live", "run_ordered"]


def run_live(
    desk: Desk, superlink: str, app: Path, tell: Callable[[str], None], *, allow_unprotected: bool = False
) -> list[Job]:
    """Start the app with `flwr run`, wait for its end, and see what became of the jobs that were open.

    Args:
        desk: the run's desk.
        superlink: name of the SuperLink in Flower's configuration.
        app: folder of the Flower app.
        tell: shown what Flower says.
        allow_unprotected: also where the run's updates were protected.

    Raises:
        ConfigError: there is no app, or no `flwr` command.
        RunError: Flower refused, or the app did not work on the queue; the jobs are as they were.
    """
    from fednano.federation.server import config_of
    from fednano.unlearning.jobs.states import FINAL
    from fednano.unlearning.live import ENDED_EARLY, PREFIX
    from fednano.unlearning.protection import require_unprotected

    if not (app / "pyproject.toml").is_file():
        raise ConfigError(
            f"no Flower app in {app.absolute()}: it has no pyproject.toml. Name its folder with --app."
        )
    desk.advance_all()
    waiting = [job.id for job in desk.store.jobs() if job.state not in FINAL]
    if not waiting:
        return []
    require_unprotected(config_of(desk.place.folder), allowed=allow_unprotected)
    folder = desk.place.folder.path.absolute()
    settings: dict[str, str | bool] = {"unlearn": str(folder), "runs-dir": str(folder.parent)}
    if allow_unprotected:
        settings["unlearn-unprotected"] = True
    given = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
    flower = Path(sys.executable).with_name("flwr")
    command = [str(flower), "run", str(app), superlink, "--stream", "--run-config", given]
    events = len(desk.place.folder.events())
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise ConfigError(
            f"{flower} cannot be started: {error.strerror}. Install flwr beside fednano."
        ) from error
    said = [event["text"] for event in desk.place.folder.events()[events:]]
    for text in said:
        tell(str(text).removeprefix(PREFIX))
    if early := [str(text).removeprefix(ENDED_EARLY) for text in said if str(text).startswith(ENDED_EARLY)]:
        raise RunError(early[-1])
    if done.returncode or not said:
        last = "\n".join(done.stdout.strip().splitlines()[-8:])
        raise RunError(f"the app did not work on the queue through {superlink!r}. Flower says:\n{last}")
    return [desk.store.job(each) for each in waiting]


def run_ordered(
    desk: Desk, server: Path, tell: Callable[[str], None], *, allow_unprotected: bool = False
) -> list[Job]:
    """Order work on the queue from `fednano server up`, wait for its end, and see what became of the open jobs.

    Args:
        desk: the run's desk.
        server: folder of the server.
        tell: shown what is said of the queue meanwhile.
        allow_unprotected: also where the run's updates were protected.

    Raises:
        ConfigError: the run is none of this server's, or no server is up; the order is kept.
        RunError: the work was given up; the jobs are in the queue.
    """
    from fednano.deploy.orders import Orders
    from fednano.security.place import ServerPlace
    from fednano.unlearning.jobs.states import FINAL
    from fednano.unlearning.live import PREFIX

    folder, orders = desk.place.folder, Orders(ServerPlace(server))
    if folder.path.absolute().parent != orders.runs.absolute():
        raise ConfigError(f"{folder.path} is no run of this server; its runs are in {orders.runs}.")
    desk.advance_all()
    waiting = [job.id for job in desk.store.jobs() if job.state not in FINAL]
    if not waiting:
        return []
    shown, noted = len(folder.events()), ""
    made = order = orders.submit_jobs(folder.id, unprotected=allow_unprotected)
    for order in orders.followed(made):
        events = folder.events()
        for event in events[shown:]:
            tell(str(event["text"]).removeprefix(PREFIX))
        shown = len(events)
        if order.note != noted:
            tell(order.note)
        noted = order.note
    if order.state == "failed":
        raise RunError(order.note)
    return [desk.store.job(each) for each in waiting]
