"""Work on a run's unlearning queue through the clients that are connected now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fednano.errors import Interrupted
from fednano.federation.config import RunConfig
from fednano.federation.deployment import Deployment, open_deployment
from fednano.federation.exchange import Stop
from fednano.federation.forgetting import check_no_commit
from fednano.federation.server import config_of
from fednano.runs import RunFolder, make_view
from fednano.runs.checkpoints import pack
from fednano.runs.tombstones import read_tombstones
from fednano.unlearning.jobs.desk import Desk
from fednano.unlearning.jobs.holdings import RunHoldings
from fednano.unlearning.jobs.job import Job
from fednano.unlearning.jobs.loku import result_of, round_of
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.runner import Result, Round, Task
from fednano.unlearning.jobs.work import work
from fednano.unlearning.live.ask import Forget
from fednano.unlearning.live.parties import LiveParties
from fednano.unlearning.methods import get_method
from fednano.unlearning.outcome import UnlearnRequest
from fednano.unlearning.runner import carry_out, untouched
from fednano.unlearning.sites import participants

__all__ = ["LiveRunner", "serve", "serve_queue"]


class LiveRunner:
    """Hands tasks to connected sites; see :class:`~fednano.unlearning.jobs.runner.Runner`.

    Args:
        deployment: the connected clients.
    """

    def __init__(self, deployment: Deployment) -> None:
        self._live = deployment

    def __call__(self, task: Task, *, progress: Callable[[Round], None], stop: Callable[[], bool]) -> Result:
        """Unlearn; the samples stay where they are.

        Raises:
            OwnerOffline: the owner is not connected, or does not answer.
            Interrupted: ``stop`` said so.
            FednanoError: it cannot be done.
        """
        began, folder = time.monotonic(), self._live.folder
        plan = vars(task.plan)
        request = UnlearnRequest(run=task.run, client=task.site, samples=(), runs_dir=task.run.parent, **plan)
        rounds = tuple(number for number, names in participants(folder).items() if task.site in names)
        forget = Forget(request.method, task.salt, task.requests, rounds, read_tombstones(folder.path).epoch)
        parties = LiveParties(self._live, request, get_method(request.method), forget, stop)
        scope = parties.scope()
        if scope.first is None:
            outcome = untouched(request, parties.leaves, began)
        else:
            first = scope.first if not forget.epoch else min(participants(folder))
            outcome = carry_out(
                request, parties, first, (), progress=lambda record: progress(round_of(record)), began=began
            )
        if outcome.status == "stopped":
            raise Interrupted("the unlearning was asked to end.")
        result = result_of(outcome, pack(outcome.leaves))
        return replace(
            result,
            samples=scope.forget,
            statement=parties.statement if outcome.best_round else {},
            # Of a batch it is known together only.
            facts={"first_exposure": outcome.first_exposure, "trained": scope.forget}
            if len(task.requests) == 1
            else {},
        )


def serve_queue(deployment: Deployment, *, tell: Callable[[str], None]) -> list[Job]:
    """Work on the queue of a deployment's run; see :func:`fednano.unlearning.jobs.work.work`."""
    place = Place(deployment.folder)
    desk = Desk(place, lambda: RunHoldings(place.folder.path))
    return work(desk, LiveRunner(deployment), place.server_key(), tell=tell, remote=True)


def serve(grid: Any, run: str, settings: RunConfig) -> None:
    """What the server's app does with ``unlearn=RUN``: meet the clients, work on the queue, go.

    Args:
        grid: Flower's connection to the clients.
        run: the run's id or folder.
        settings: the app's run configuration; where runs are, and how the language host is reached.

    Raises:
        RunError: there is no such run, or no client is connected.
        JobStateError: another worker is at it.
    """
    folder, view = RunFolder.open(run, root=settings.runs_dir), make_view()
    check_no_commit(folder.path)
    before = config_of(folder)
    config = before.changed(
        runs_dir=str(folder.path.parent),
        cache_dir=before.cache_dir or str((folder.path / "cache").absolute()),
        host_address=settings.host_address or before.host_address,
        host_ca=settings.host_ca or before.host_ca,
        host_token_file=settings.host_token_file or before.host_token_file,
        join_timeout=settings.join_timeout,
        round_timeout=settings.round_timeout,
    )

    def tell(text: str) -> None:
        view.message(text)
        folder.append_event("info", f"unlearning: {text}")

    try:
        with open_deployment(grid, RunFolder(Path(folder.path)), config, view, Stop()) as deployment:
            if not serve_queue(deployment, tell=tell):
                tell("nothing to do")
    finally:
        folder.close()
