"""Runs that were ordered with `fednano run`: started one after the other, and resumed when their process was killed.

An order is a file in ``state/orders``, so that neither a crash nor a restart of the machine loses one. It is done when
its run has a summary, failed when its run ended with an error that a person must look at, and otherwise tried again
from the run's last checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fednano.deploy.node import flower
from fednano.errors import ConfigError, RunError
from fednano.federation.config import RunConfig
from fednano.runs.atomic import read_json, write_json
from fednano.security.place import ServerPlace

__all__ = ["Order", "Orders"]

_START_S = 180.0
_ATTEMPTS = 10
_OPEN = ("waiting", "running")


@dataclass(frozen=True)
class Order:
    """A run that is to be.

    Attributes:
        id: sorts by time.
        settings: of the run, those that differ from the defaults.
        state: ``waiting``, ``running``, ``done`` or ``failed``.
        run: id of its run folder, once there is one.
        attempts: how often it was started.
        started: of the newest attempt, seconds since 1970.
        before: run folders that were there before it started.
        note: why it failed.
    """

    id: str
    settings: dict[str, Any]
    state: str = "waiting"
    run: str = ""
    attempts: int = 0
    started: float = 0.0
    before: tuple[str, ...] = ()
    note: str = ""


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
        order = Order(f"{time.time_ns():020d}-{uuid.uuid4().hex[:6]}", whole)
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
            found.append(Order(**{**facts, "before": tuple(facts["before"])}))
        return found

    def get(self, identity: str) -> Order:
        """One order. Raises RunError when there is none."""
        for order in self.all():
            if order.id == identity:
                return order
        raise RunError(f"there is no order {identity!r} in {self.folder}.")

    def current(self) -> Order | None:
        """The oldest that is not done or failed."""
        return next((order for order in self.all() if order.state in _OPEN), None)

    def tend(self, environment: Mapping[str, str], *, fresh: bool) -> Order | None:
        """See to the current order: start it, notice its end, or start it again.

        Args:
            environment: of Flower's commands.
            fresh: the SuperLink was started anew, so that whatever ran on it is gone.

        Returns:
            The current order.
        """
        order = self.current()
        if order is None:
            return None
        if order.state == "running":
            order = self._look_at(order, fresh=fresh)
        if order.state == "waiting":
            order = self._start(order, environment)
        self.save(order)
        return order

    def _look_at(self, order: Order, *, fresh: bool) -> Order:
        """What became of a run."""
        if not order.run:
            new = sorted(self._folders() - set(order.before))
            order = replace(order, run=new[0]) if new else order
        folder = self.runs / order.run if order.run else None
        if folder is not None and (folder / "summary.json").exists() and order.run not in self.place.active():
            return replace(order, state="done")
        if folder is not None and (error := _ended_with(folder, order.started)):
            return replace(order, state="failed", note=error)
        late = time.time() - order.started > _START_S
        if fresh or (self._died(order) if order.run else late):
            if order.attempts >= _ATTEMPTS:
                return replace(order, state="failed", note=f"its process ended {_ATTEMPTS} times")
            return replace(order, state="waiting")
        return order

    def _died(self, order: Order) -> bool:
        """Whether the process of a run has ended without saying why."""
        pid = self.place.active().get(order.run, 0)
        if not pid:
            return time.time() - order.started > _START_S
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    def _folders(self) -> set[str]:
        return {path.parent.name for path in self.runs.glob("*/config.json") if not path.parent.is_symlink()}

    def _start(self, order: Order, environment: Mapping[str, str]) -> Order:
        """Hand a run to the SuperLink."""
        checkpoint = order.run and any((self.runs / order.run / "checkpoints").glob("round-*"))
        own = {"server-dir": str(self.place.root.absolute()), "runs-dir": str(self.runs.absolute())}
        settings = {**order.settings, **own, "resume": order.run if checkpoint else ""}
        if order.run:
            self.place.deactivate(order.run)
        state = self.place.root / "state"
        config = state / "run-config.toml"
        config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
        done = subprocess.run(
            [flower("flwr"), "run", str(state / "app"), "server", "--run-config", str(config)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            kept = "waiting" if order.attempts + 1 < _ATTEMPTS else "failed"
            note = " ".join(said[-3:])[:500]
            return replace(order, state=kept, attempts=order.attempts + 1, note=note)
        return replace(
            order,
            state="running",
            run=order.run if checkpoint else "",
            attempts=order.attempts + 1,
            started=time.time(),
            before=tuple(sorted(self._folders())),
            note="",
        )


def _ended_with(folder: Path, since: float) -> str:
    """The error that a run ended with after ``since``; empty while there is none."""
    from fednano.runs import RunFolder

    for event in reversed(RunFolder(folder).events()):
        if event.get("level") == "error":
            return str(event.get("text", "")) if _seconds(event) >= since - 1 else ""
    return ""


def _seconds(event: Mapping[str, Any]) -> float:
    from datetime import datetime

    return datetime.fromisoformat(str(event["time"])).timestamp()
