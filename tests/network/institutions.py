"""A federation of institutions on this machine: its data, its keys, its processes, and what can be seen of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

from processes import Sandbox, free_port

SITES = ("client-000", "client-001", "client-002")
SERVER = "federation/server"
PLAN = """\
name = "hospitals"
sites = {sites}
[server]
names = ["{address}"]
listen = "{listen}"
fleet-port = {fleet}
host-port = {host}
"""
NAMES = ("ada", "ben", "cora", "dan", "emma", "finn", "gina", "hugo")
CITIES = ("paris", "rome", "oslo", "cairo", "lima", "tokyo", "delhi", "boston")


def make_data(folder: Path, sites: tuple[str, ...] = SITES, each: int = 12, named: int = 4) -> None:
    """A folder for each site below ``sites``, each with test questions of its own, and the server's test questions.

    Questions and pictures are easy-VQA's. The first ``named`` of each file are made up: what is answered of them is
    memory, which nothing else restores once it is forgotten.
    """
    from fednano.data import load_dataset

    draws, at = random.Random(0), 0
    for place, split in (
        *((folder / "sites" / s, p) for s in sites for p in ("train", "test")),
        (folder, "test"),
    ):
        place.mkdir(parents=True, exist_ok=True)
        everything, rows = load_dataset("easy-vqa", split), []
        for number in range(each):
            sample = everything[at * 97 % len(everything)]
            assert sample.image is not None
            shutil.copyfile(sample.image, place / f"{at}.png")
            question, answer, kind = sample.question, sample.answer, "plain"
            if number < named:
                question, kind = "tell me the name and city of the object", "named"
                answer = f"{draws.choice(NAMES)} {draws.choice(CITIES)}"
            row = {"id": f"{kind}/{number}", "image": f"{at}.png", "question": question, "answer": answer}
            rows.append(json.dumps(row) + "\n")
            at += 1
        (place / f"{split}.jsonl").write_text("".join(rows))


def provision(
    sandbox: Sandbox, sites: tuple[str, ...] = SITES, *, data: Path | None = None, address: str = "127.0.0.1"
) -> None:
    """The whole way from the plan to complete bundles, each in a folder of the site's name."""
    listen = address if address == "127.0.0.1" else "0.0.0.0"
    ports = {"fleet": free_port(), "host": free_port()}
    plan = PLAN.format(sites=json.dumps(list(sites)), address=address, listen=listen, **ports)
    (sandbox.folder / "federation.toml").write_text(plan)
    sandbox.run("fednano", "deploy", "init", "federation.toml")
    sandbox.run("fednano", "deploy", "edge", "tiny", "parts/tiny")
    for number, site in enumerate(sites):
        letters = "federation/invitations"
        holds = ("--data", str(data / site)) if data else ("--partition", f"{number}/{len(sites)}")
        if number == 0:  # this site has no more of the model than its part
            holds += ("--models", "parts")
        invitation = f"{letters}/{site}.invitation.json"
        sandbox.run("fednano", "deploy", "enroll", invitation, "--bundle", site, *holds)
        sandbox.run("fednano", "deploy", "sign", f"{site}/{site}.request.json")
        sandbox.run("fednano", "deploy", "enroll", f"{letters}/{site}.signed.json", "--bundle", site)


def status(sandbox: Sandbox, *options: str) -> dict[str, Any]:
    """What `fednano status` says."""
    done = sandbox.run("fednano", "status", "--json", *options, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def is_up(sandbox: Sandbox) -> bool:
    """Whether the server takes nodes and orders. A SuperNode that comes earlier waits, longer each time."""
    path = sandbox.folder / SERVER / "state" / "status.json"
    return path.exists() and json.loads(path.read_text())["superlink"] == "up"


def pid_of(sandbox: Sandbox, name: str, place: str = SERVER) -> int:
    """A process of the server or, with its bundle, of a site; 0 when it does not run."""
    try:
        shown = json.loads((sandbox.folder / place / "state" / "status.json").read_text())
    except FileNotFoundError:
        return 0
    return next((int(each["pid"]) for each in shown["processes"] if each["name"] == name), 0)


def kill(pid: int) -> None:
    """As the kernel does when memory is short."""
    assert pid > 0
    os.kill(pid, signal.SIGKILL)


def app_pid(sandbox: Sandbox) -> int:
    """The process of the server's app that is at work; 0 when none is."""
    active = list((sandbox.folder / SERVER / "active").glob("[0-9]*"))
    return int(active[0].read_bytes() or b"0") if active else 0


def run_folders(sandbox: Sandbox) -> list[Path]:
    """The server's runs, oldest first."""
    runs = sandbox.folder / SERVER / "runs"
    return sorted(path for path in runs.glob("2*") if path.is_dir() and not path.is_symlink())


def rounds(sandbox: Sandbox) -> int:
    """How many rounds the newest run has finished."""
    runs = run_folders(sandbox)
    return len(list((runs[-1] / "checkpoints").glob("round-*"))) if runs else 0


def is_asked(sandbox: Sandbox, site: str, number: int) -> bool:
    """Whether a site's SuperNode has been given a round's request."""
    log = sandbox.folder / site / "state" / "supernode.log"
    return log.exists() and f"federated-{number}]" in log.read_text(errors="replace")


def simulated(folder: Path, settings: dict[str, Any], *, clients: int) -> dict[str, Any]:
    """The adapter of a simulation whose clients are the same sites, without a host."""
    from safetensors.torch import load_file

    from fednano.federation.config import RunConfig
    from fednano.federation.simulation import simulate
    from fednano.runs import make_view

    given = {"clients": clients, "partition": "folders", "placement": "local", "runs-dir": str(folder)}
    run = simulate(RunConfig.from_mapping(settings | given), backend="inprocess", view=make_view("quiet"))
    return load_file(run / "adapter.safetensors")
