"""What the server is to do: runs ordered with `fednano run`, and unlearning jobs, one after the other.

An order is a file in ``state/orders``, so that neither a crash nor a restart of the machine loses one. That of a run is
done when the run has a summary, failed when the run ended with an error before its first round or kept ending with one,
and otherwise tried again from the run's last checkpoint. That of jobs is made by the server as soon as a run has jobs
that can be worked on, and is done when none is left. While their owners are away, or after an error, it lets others go
first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fednano.deploy.ends import error_of, how_it_ended
from fednano.deploy.jobs import Listed, listed, settings_for, workable
from fednano.deploy.node import require_up, run_app
from fednano.deploy.order import JOBS, RUN, Order, new_id
from fednano.deploy.supervise import alive
from fednano.errors import ConfigError, FednanoError, RunError
from fednano.federation.config import UNPROTECTED, RunConfig
from fednano.runs import RunFolder
from fednano.runs.atomic import read_json, write_json
from fednano.security.place import ServerPlace

__all__ = ["JOBS", "Order", "Orders"]

_START_S = 180.0
_ATTEMPTS = 10
_TRIES = 4  # after an error, of a run that has finished rounds: a site that was away may be back
_OPEN = ("waiting", "running")
_PAUSE_S, _LONGEST_PAUSE_S = 30.0, 1_800.0


@dataclass(frozen=True)
class Orders:
    """The orders of a server.

    Attributes:
        place: folder of the server.
    """

    place: ServerPlace

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.place.root / "state" / "orders"

    @property
    def runs(self) -> Path:
        """Where their runs lie."""
        return self.place.root / "runs"

    def submit(self, settings: Mapping[str, Any]) -> Order:
        """Order a run.

        Args:
            settings: of the run. ``clients`` is by default the number of enrolled sites, ``model`` the host's.

        Raises:
            ConfigError: a setting is wrong, or is the server's to decide.
        """
        for name in ("host-address", "host-ca", "host-token-file", "server-dir", "runs-dir"):
            if settings.get(name):
                raise ConfigError(f"{name} is the server's own affair in `fednano run`; leave it out.")
        if settings.get("placement", "split") != "split" or settings.get("baselines"):
            raise ConfigError(
                "a run among institutions is 'split' and without baselines; leave the option out."
            )
        sites = [site for site in self.place.sites().values() if site.serial and not site.revoked]
        if not sites and "clients" not in settings:
            raise ConfigError("no site is enrolled yet. See: fednano deploy sites")
        plan = self.place.plan["host_settings"]
        base = {"clients": len(sites), "model": plan["model"], "threads": plan["threads"]}
        whole = {**base, **settings}
        if whole["model"] != plan["model"]:
            raise ConfigError(
                f"model is {whole['model']!r}, but the language host serves {plan['model']!r}. Change [host] in the "
                "federation's plan, or leave the option out."
            )
        RunConfig.from_mapping(whole)
        order = Order(new_id(), whole)
        self.save(order)
        return order

    def submit_jobs(self, run: str, *, unprotected: bool = False) -> Order:
        """Order work on a run's unlearning jobs at the next turn; one that is ordered already is not ordered twice.

        Args:
            run: id of the run.
            unprotected: also where the run's updates were protected.

        Raises:
            RunError: that is not allowed, or the run has no adapter yet.
        """
        settings_for(self.runs / run, unprotected=unprotected)
        given = {UNPROTECTED: True} if unprotected else {}
        ours = (order for order in self.all() if order.kind == JOBS and order.run == run)
        order = next((order for order in ours if order.state in _OPEN), None)
        if order is None:
            order = Order(new_id(), given, run=run, kind=JOBS)
        elif order.state == "waiting":
            order = replace(order, settings={**order.settings, **given}, attempts=0, after=0.0)
        self.save(order)
        return order

    def save(self, order: Order) -> None:
        """Write an order down."""
        write_json(self.folder / f"{order.id}.json", asdict(order))

    def all(self) -> list[Order]:
        """All orders, oldest first."""
        found = []
        for path in sorted(self.folder.glob("[0-9]*.json")):
            facts = read_json(path)
            lists = {name: tuple(facts.get(name, ())) for name in ("before", "jobs")}
            found.append(Order(**{**facts, **lists}))
        return found

    def get(self, identity: str) -> Order:
        """One order. Raises RunError when there is none."""
        for order in self.all():
            if order.id == identity:
                return order
        raise RunError(f"there is no order {identity!r} in {self.folder}.")

    def followed(self, order: Order) -> Iterator[Order]:
        """An order as it stands, each second until it has ended, that one included.

        Raises:
            ConfigError: no server is up that could carry it out; the order is kept.
        """
        for _ in require_up(self.place.root):
            if order.state not in _OPEN:
                return
            time.sleep(1)
            order = self.get(order.id)
            yield order

    def current(self, away: Collection[str] = (), known: list[Order] | None = None) -> Order | None:
        """The one that is running, else the oldest that can start now.

        Args:
            away: ids of orders that wait for a site.
            known: all orders, where they were read already.
        """
        open_ = [order for order in (self.all() if known is None else known) if order.state in _OPEN]
        ready = (o for o in open_ if o.id not in away and o.after <= time.time())
        return next((o for o in open_ if o.state == "running"), next(ready, None))

    def tend(
        self,
        environment: Mapping[str, str],
        *,
        fresh: bool,
        connected: Collection[str] = (),
        clear: Callable[[], None] = lambda: None,
    ) -> Order | None:
        """See to the current order: start it, notice its end, or start it again.

        Args:
            environment: of Flower's commands.
            fresh: the SuperLink was started anew, so that whatever ran on it is gone.
            connected: the sites whose nodes are connected; jobs wait for their owners.
            clear: ends whatever Flower takes to be under way; called before anything is started.

        Returns:
            The current order, or one that waits.

        Raises:
            DataError: the jobs of a run cannot be read.
        """
        queues = workable(listed(self.runs))
        known = self.all()
        known += self._enlist(queues, known)
        away = _away(queues, connected, known)
        order = self.current(away, known)
        if order is None:
            return next(iter(away.values()), None) or next((o for o in known if o.state in _OPEN), None)
        if order.state == "running":
            look = self._look_at_jobs if order.kind == JOBS else self._look_at
            order = look(order, fresh=fresh)
        if order.state == "waiting" and order.after <= time.time():
            clear()
            order = self._start(order, environment)
        self.save(order)
        return order

    def _enlist(self, queues: Mapping[str, list[Listed]], known: list[Order]) -> list[Order]:
        """Order work on jobs that no order is for, if their run has ended; jobs whose order failed are left alone."""
        made = []
        for run, jobs in queues.items():
            ids = tuple(job.job for job in jobs)
            ours = [order for order in known if order.kind == JOBS and order.run == run]
            covered = {job for order in ours if order.state == "failed" for job in order.jobs}
            if any(order.state in _OPEN for order in ours) or set(ids) <= covered:
                continue
            if (self.runs / run / "adapter.json").exists() and run not in self.place.active():
                made.append(Order(new_id(), {}, run=run, kind=JOBS, jobs=ids))
                self.save(made[-1])
        return made

    def _look_at_jobs(self, order: Order, *, fresh: bool) -> Order:
        """What became of the work on a run's queue."""
        folder = self.runs / order.run
        reason = how_it_ended(folder, order.events)
        if reason is None or order.run in self.place.active():
            if fresh or self._died(order):
                return self._again(order, "its process was killed", pause=0.0)
            return order
        left = workable(listed(self.runs)).get(order.run, [])
        if not left:
            return replace(order, state="done", note="")
        order = replace(order, jobs=tuple(job.job for job in left))
        if reason:
            return self._again(order, reason, pause=_pause(order.attempts))
        note = "; ".join(f"{job.job} {job.note}" for job in left)
        return self._again(replace(order, attempts=0), note, pause=_PAUSE_S)

    def _again(self, order: Order, note: str, *, pause: float, most: int = _ATTEMPTS) -> Order:
        if order.attempts >= most and not self._progress(order):
            return replace(order, state="failed", note=f"given up after {order.attempts} times: {note}")
        return replace(order, state="waiting", note=note, after=time.time() + pause)

    def _look_at(self, order: Order, *, fresh: bool) -> Order:
        """What became of a run."""
        if not order.run:
            new = sorted(self._folders() - set(order.before))
            order = replace(order, run=new[0]) if new else order
        folder = self.runs / order.run if order.run else None
        if folder is not None and (folder / "summary.json").exists() and order.run not in self.place.active():
            return replace(order, state="done")
        if folder is not None and (error := error_of(folder, order.events)):
            if not RunFolder(folder).checkpoints():
                return replace(order, state="failed", note=error)
            return self._again(order, error, pause=_pause(order.attempts), most=_TRIES)
        late = time.time() - order.started > _START_S
        if fresh or (self._died(order) if order.run else late):
            return self._again(order, "its process was killed", pause=0.0)
        return order

    def _progress(self, order: Order) -> int:
        """How many rounds a run has finished since it was started the last time."""
        done = RunFolder(self.runs / order.run).checkpoints() if order.run else []
        return max(0, (done[-1] if done else 0) - order.rounds)

    def _died(self, order: Order) -> bool:
        """Whether the process of a run has ended without saying why."""
        pid = self.place.active().get(order.run, 0)
        if not pid:
            return time.time() - order.started > _START_S
        return not alive(pid)

    def _folders(self) -> set[str]:
        return {path.parent.name for path in self.runs.glob("*/config.json") if not path.parent.is_symlink()}

    def _start(self, order: Order, environment: Mapping[str, str]) -> Order:
        """Hand it to the SuperLink."""
        checkpoint = order.run and any((self.runs / order.run / "checkpoints").glob("round-*"))
        settings, known = {**order.settings, "resume": order.run if checkpoint else ""}, 0
        if order.kind == JOBS:
            folder = self.runs.absolute() / order.run
            try:
                settings = settings_for(folder, unprotected=bool(order.settings.get(UNPROTECTED)))
            except FednanoError as error:
                return replace(order, state="failed", note=str(error))
        if checkpoint or order.kind == JOBS:
            known = len(RunFolder(self.runs / order.run).events())
        own = {"server-dir": str(self.place.root.absolute()), "runs-dir": str(self.runs.absolute())}
        if order.run:
            self.place.deactivate(order.run)
        if order.kind == RUN and (done := self._progress(order)):
            order = replace(order, attempts=0, rounds=order.rounds + done)
        order = replace(order, attempts=order.attempts + 1)
        if note := run_app(self.place.root / "state", {**settings, **own}, environment):
            return replace(order, state="waiting" if order.attempts < _ATTEMPTS else "failed", note=note)
        return replace(
            order,
            state="running",
            run=order.run if checkpoint or order.kind == JOBS else "",
            started=time.time(),
            before=tuple(sorted(self._folders())),
            note="",
            events=known,
        )


def _pause(attempts: int) -> float:
    return min(_PAUSE_S * 2.0 ** max(0, attempts - 1), _LONGEST_PAUSE_S)


def _away(
    queues: Mapping[str, list[Listed]], connected: Collection[str], known: list[Order]
) -> dict[str, Order]:
    """Orders that wait because none of their jobs' owners is connected, by id."""
    found = {}
    for order in known:
        owners = {job.site for job in queues.get(order.run, ())}
        if order.kind == JOBS and order.state == "waiting" and owners and not owners & set(connected):
            found[order.id] = replace(order, note=f"waits for {', '.join(sorted(owners))} to connect")
    return found
