"""The worker: takes jobs from the queue, has them unlearned, judges the outcome, and commits it.

The runner trains a shadow adapter; the global one is not touched before the commit. Queued jobs of the same owner with
the same plan are worked on together, as one batch with one forget set, and each gets its own receipt.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fednano.errors import FednanoError, Interrupted, JobStateError, RunError
from fednano.runs.atomic import write_json
from fednano.security.keys import Signer, salted_hash
from fednano.unlearning.jobs.commit import commit
from fednano.unlearning.jobs.desk import Desk
from fednano.unlearning.jobs.exchange import finish_pending, stage
from fednano.unlearning.jobs.job import Job
from fednano.unlearning.jobs.request import Plan
from fednano.unlearning.jobs.runner import OwnerOffline, Result, Round, Runner, Task
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.store import only_worker

__all__ = ["work"]

_WORKER = "worker"


def work(
    desk: Desk,
    runner: Runner,
    signer: Signer,
    *,
    tell: Callable[[str], None] = lambda text: None,
    jobs: int | None = None,
    remote: bool = False,
) -> list[Job]:
    """Finish what was cut off, then work on the queue until it is empty.

    Args:
        desk: the run's desk.
        runner: what unlearns.
        signer: the server's key, which signs receipts and log.
        tell: shown to people while it happens.
        jobs: stop after so many batches; ``None`` for all.
        remote: the runner reaches the samples at their site; their ids need not be known here.

    Returns:
        The jobs that were touched, as they stand now.

    Raises:
        JobStateError: another worker is at it.
        Interrupted: Ctrl-C; what was running is back in the queue.
        RunError: the disk is full; nothing is lost, the next call goes on.
    """
    place, store = desk.place, desk.store
    touched: set[str] = set()
    waiting: set[str] = set()
    done = 0
    with only_worker(place.lock):
        for line in finish_pending(place):
            tell(line)
        desk.advance_all()
        for job in store.jobs(State.RUNNING):
            _hand_back([job], store, "its worker ended; it starts again", by=_WORKER)
            touched.add(job.id)
        for batch in _batches(store.jobs(State.VERIFYING)):
            touched |= {job.id for job in batch}
            _conclude(desk, batch, signer, tell)
        while jobs is None or done < jobs:
            queued = [job for job in store.jobs(State.QUEUED) if job.id not in waiting]
            if not queued:
                break
            batch = [job for job in queued if job.site == queued[0].site and _plan(job) == _plan(queued[0])]
            touched |= {job.id for job in batch}
            done += 1
            try:
                running = _run(desk, batch, runner, tell, remote=remote)
            except OwnerOffline as error:
                waiting |= {job.id for job in batch}
                _hand_back([store.job(job.id) for job in batch], store, f"waits: {error}", by=_WORKER)
                tell(f"{_ids(batch)}: waits: {error}")
                continue
            if running:
                _conclude(desk, running, signer, tell)
    return [store.job(identity) for identity in sorted(touched)]


def _run(
    desk: Desk, batch: list[Job], runner: Runner, tell: Callable[[str], None], *, remote: bool
) -> list[Job]:
    """Have a batch unlearned and keep the outcome; returns the jobs that are ready to be judged."""
    place, store, name = desk.place, desk.store, batch[0].id
    ids = [job.id for job in batch]
    note = f"together with {', '.join(i for i in ids if i != name)}" if len(ids) > 1 else ""
    store.move(ids, State.RUNNING, actor=_WORKER, batch=name, note=note)
    store.clear_rounds(name)
    tell(f"{_ids(batch)}: running")

    def progress(record: Round) -> None:
        store.add_round(name, record.number, vars(record))

    def stop() -> bool:
        return any(store.job(identity).stop for identity in ids)

    ready: list[Job] = []
    with _ending(desk, ids):
        base, payload, info = place.adapter()
        task = _task(desk, batch, remote=remote)
        try:
            result = runner(task, progress=progress, stop=stop)
        except Interrupted:
            if not stop():
                raise
            result = None
        if result is None or stop():
            return ready
        problem = _misfit(payload, result)
        if problem:
            raise JobStateError(problem)
        stage(place, name, "before", payload, info)
        stage(
            place, name, "after", result.payload, {**info, **result.info, "unlearned": _unlearned(info, ids)}
        )
        outcome = {k: v for k, v in vars(result).items() if k not in ("payload", "info")}
        write_json(
            place.staging(name) / "outcome.json",
            {**outcome, "base": base, "samples": result.samples or len(task.samples)},
        )
        return store.move(
            ids, State.VERIFYING, actor=_WORKER, note=f"{result.rounds} rounds: {result.stopped}"
        )


@contextmanager
def _ending(desk: Desk, ids: list[str]) -> Iterator[None]:
    """However the runner ends, its jobs do not stay in ``running``."""
    store = desk.store
    try:
        yield
    except OwnerOffline:
        raise
    except RunError as error:
        _hand_back([store.job(i) for i in ids], store, str(error), by=_WORKER)
        raise
    except FednanoError as error:
        _leave(store, ids, State.FAILED, str(error))
    except (Interrupted, KeyboardInterrupt):
        _hand_back([store.job(i) for i in ids], store, "the worker was interrupted", by=_WORKER)
        raise
    except Exception as error:
        _leave(store, ids, State.FAILED, f"{type(error).__name__}: {error}")
        raise
    finally:
        left = [job for job in map(store.job, ids) if job.state is State.RUNNING and job.stop]
        if left:
            others = [job for job in map(store.job, ids) if job.state is State.RUNNING and not job.stop]
            _hand_back(left + others, store, "a job of its batch was cancelled", by=_WORKER)


def _conclude(desk: Desk, batch: list[Job], signer: Signer, tell: Callable[[str], None]) -> None:
    """Judge what a batch came to: commit it, reject it, or queue it again."""
    place, store, name = desk.place, desk.store, batch[0].batch
    ids = [job.id for job in batch]
    stopped = [job for job in batch if job.stop]
    if stopped:
        for job in stopped:
            store.move([job.id], State.CANCELLED, actor=job.stop, note="cancelled while it was running")
        rest = [job.id for job in batch if not job.stop]
        store.move(rest, State.QUEUED, actor=_WORKER, note="a job of its batch was cancelled")
        return
    path = place.staging(name) / "outcome.json"
    if not path.is_file():
        store.move(ids, State.QUEUED, actor=_WORKER, note="its outcome is lost; it starts again")
        return
    outcome: dict[str, Any] = json.loads(path.read_bytes())
    if place.adapter()[0] != outcome["base"]:
        store.move(
            ids, State.QUEUED, actor=_WORKER, note="the adapter was trained on meanwhile; it starts again"
        )
        tell(f"{_ids(batch)}: the adapter was trained on meanwhile; queued again")
        return
    if not outcome["accepted"]:
        reasons = "; ".join(outcome["reasons"]) or "the outcome was not accepted"
        store.move(ids, State.REJECTED, actor=_WORKER, note=reasons, facts={"outcome": _figures(outcome)})
        shutil.rmtree(place.staging(name), ignore_errors=True)
        tell(f"{_ids(batch)}: rejected: {reasons}. The adapter is as it was")
        return
    wanted = _wanted(desk, batch)
    commit(desk, batch, outcome, signer, secrets=() if wanted is None else (*wanted[0], *wanted[1]))
    tell(f"{_ids(batch)}: committed")


def _figures(outcome: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: outcome[key] for key in ("before", "after", "reference", "seconds", "bytes", "rounds", "stopped")
    }


def _hand_back(jobs: list[Job], store: Any, note: str, *, by: str) -> None:
    """Running jobs go back to the queue, but those that somebody cancelled end."""
    for job in jobs:
        if job.state is State.RUNNING and job.stop:
            store.move([job.id], State.CANCELLED, actor=job.stop, note="cancelled while it was running")
        elif job.state is State.RUNNING:
            store.move([job.id], State.QUEUED, actor=by, note=note)


def _leave(store: Any, ids: list[str], target: State, note: str) -> None:
    running = [job.id for job in map(store.job, ids) if job.state is State.RUNNING]
    if running:
        store.move(running, target, actor=_WORKER, note=note)


def _batches(jobs: list[Job]) -> list[list[Job]]:
    names = dict.fromkeys(job.batch for job in jobs)
    return [[job for job in jobs if job.batch == name] for name in names]


def _plan(job: Job) -> Plan:
    return Plan(**{name: job.request[name] for name in vars(Plan())})


def _task(desk: Desk, batch: list[Job], *, remote: bool) -> Task:
    """What the runner is to do for a batch.

    Raises:
        OwnerOffline: only the owner knows the samples, its data is not here, and the runner cannot reach it.
    """
    site, folder, plan = batch[0].site, desk.place.folder.path, _plan(batch[0])
    if remote:
        requests = tuple(job.envelope for job in batch)
        return Task(folder, site, (), plan, requests=requests, salt=desk.place.registry.site(site).salt)
    wanted = _wanted(desk, batch)
    if wanted is None:
        raise OwnerOffline(
            f"the data of {site} is not on this machine. Work the queue where it is (fednano unlearn run --data "
            f"{site}=FOLDER), or through the sites themselves (fednano unlearn run --superlink NAME)."
        )
    return Task(folder, site, wanted[0], plan, withheld=wanted[1])


def _wanted(desk: Desk, batch: list[Job]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Ids of the samples of a batch, in the site's order: those that were trained on, and the others.

    ``None`` where only the owner knows them.
    """
    site = batch[0].site
    holding = desk.holdings.holding(site)
    if holding is None:
        return None
    wanted, salt = {each for job in batch for each in job.request["ids"]}, desk.place.registry.site(site).salt
    named = [s.id for s in holding.samples if salted_hash(salt, "sample", s.id) in wanted]
    trained = {s.id for s in holding.train if s.id in holding.first_round}
    return tuple(i for i in named if i in trained), tuple(i for i in named if i not in trained)


def _unlearned(info: Mapping[str, Any], ids: list[str]) -> list[str]:
    return [*info.get("unlearned", []), *ids]


def _misfit(payload: bytes, result: Result) -> str:
    """Why the shadow adapter cannot stand where the old one stood; empty when it can."""
    try:
        old, new = _header(payload), _header(result.payload)
    except (ValueError, struct.error) as error:
        return f"the runner's adapter is no safetensors file: {error}"
    if old != new and not result.info:
        return (
            f"the runner's adapter has the tensors {new}, the run's has {old}, and its description says nothing of the "
            "change"
        )
    return ""


def _header(payload: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of a safetensors file's tensors, from its header alone."""
    (size,) = struct.unpack("<Q", payload[:8])
    header = json.loads(payload[8 : 8 + size])
    return {
        name: (each["dtype"], tuple(each["shape"])) for name, each in header.items() if name != "__metadata__"
    }


def _ids(batch: list[Job]) -> str:
    return ", ".join(job.id for job in batch)
