"""Work on a run's unlearning queue through the clients that are connected now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fednano.errors import ConfigError, Interrupted
from fednano.federation.config import RunConfig
from fednano.federation.deployment import Deployment, open_deployment
from fednano.federation.enrolled import auditor_of
from fednano.federation.exchange import Stop
from fednano.federation.forgetting import check_no_commit
from fednano.federation.server import config_of
from fednano.runs import RunFolder, make_view
from fednano.runs.checkpoints import pack
from fednano.runs.tombstones import read_tombstones
from fednano.unlearning.jobs.desk import Desk
from fednano.unlearning.jobs.holdings import RunHoldings
from fednano.unlearning.jobs.job import Job
from fednano.unlearning.jobs.loku import result_of, round_of, with_earlier
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.runner import Result, Round, Task
from fednano.unlearning.jobs.work import work
from fednano.unlearning.live import ENDED, ENDED_EARLY, PREFIX
from fednano.unlearning.live.ask import Forget
from fednano.unlearning.live.parties import LiveParties
from fednano.unlearning.methods import get_method
from fednano.unlearning.outcome import UnlearnRequest
from fednano.unlearning.protection import require_unprotected
from fednano.unlearning.runner import carry_out, untouched
from fednano.unlearning.sites import participants

__all__ = ["LiveRunner", "serve", "serve_queue"]


class LiveRunner:
    """Hands tasks to connected sites; see :class:`~fednano.unlearning.jobs.runner.Runner`.

    Args:
        deployment: the connected clients.
        allow_unprotected: also where the run's updates were protected; see `fednano.unlearning.protection`.
    """

    def __init__(self, deployment: Deployment, *, allow_unprotected: bool = False) -> None:
        self._live, self._allow_unprotected = deployment, allow_unprotected

    def __call__(self, task: Task, *, progress: Callable[[Round], None], stop: Callable[[], bool]) -> Result:
        """Unlearn; the samples stay where they are.

        Raises:
            OwnerOffline: the owner is not connected, or does not answer.
            RunError: the run's updates were protected, and that this job's are not is not allowed.
            Interrupted: ``stop`` said so.
            FednanoError: it cannot be done.
        """
        began, folder = time.monotonic(), self._live.folder
        lost = require_unprotected(self._live.config, allowed=self._allow_unprotected)
        plan = vars(task.plan)
        _refuse_early(task.plan.method, self._live.config)
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
        result = result_of(outcome, pack(outcome.leaves), notes=lost)
        forgotten = read_tombstones(folder.path)
        if result.accepted and forgotten.sets:
            result = with_earlier(result, parties.earlier(outcome.leaves, forgotten))
        return replace(
            result,
            samples=scope.forget,
            statement=parties.statement if outcome.best_round else {},
            # Of a batch it is known together only.
            facts={"first_exposure": outcome.first_exposure, "trained": scope.forget}
            if len(task.requests) == 1
            else {},
        )


def _refuse_early(method: str, config: RunConfig) -> None:
    """Say before anything is computed what live sites cannot do.

    Raises:
        ConfigError: the method needs what a language host does not give, or the run's steps hide what it would see.
    """
    if method == "kl":
        raise ConfigError(
            "the method 'kl' compares whole distributions of the language model, which a host does not give to live "
            "sites. Choose 'gradient_difference' or 'loku', or work where the data is: fednano unlearn run --data."
        )
    if config.exchange == "label-private":
        raise ConfigError(
            "this run's steps are label-private, and an unlearning job's scores would tell the host the labels. Work "
            "where the data is: fednano unlearn run --data SITE=FOLDER."
        )


def serve_queue(
    deployment: Deployment, *, tell: Callable[[str], None], allow_unprotected: bool = False
) -> list[Job]:
    """Work on the queue of a deployment's run; see :func:`fednano.unlearning.jobs.work.work`."""
    place = Place(deployment.folder)
    desk = Desk(place, lambda: RunHoldings(place.folder.path))
    return work(
        desk,
        LiveRunner(deployment, allow_unprotected=allow_unprotected),
        place.server_key(),
        tell=tell,
        remote=True,
    )


def serve(grid: Any, run: str, settings: RunConfig, *, allow_unprotected: bool = False) -> None:
    """What the server's app does with ``unlearn=RUN``: meet the clients, work on the queue, go.

    Args:
        grid: Flower's connection to the clients.
        run: the run's id or folder.
        settings: the app's run configuration; where runs are, and how the language host is reached.
        allow_unprotected: see `LiveRunner`.

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
        server_dir=settings.server_dir or before.server_dir,
        join_timeout=settings.join_timeout,
        round_timeout=settings.round_timeout,
    )

    def tell(text: str) -> None:
        view.message(text)
        folder.append_event("info", f"{PREFIX}{text}")

    audit = auditor_of(config.to_mapping())
    try:
        with open_deployment(grid, RunFolder(Path(folder.path)), config, view, Stop()) as deployment:
            done = serve_queue(deployment, tell=tell, allow_unprotected=allow_unprotected)
            for job in done:
                audit.record("job", run=folder.id, job=job.id, site=job.site, state=job.state.value)
            if not done:
                tell("nothing to do")
    except Exception as error:
        # Whoever ordered this reads here that it is over, and why; a process that was killed says nothing.
        folder.append_event("warning", f"{ENDED_EARLY}{error}")
        raise
    else:
        folder.append_event("info", ENDED)
    finally:
        folder.close()
