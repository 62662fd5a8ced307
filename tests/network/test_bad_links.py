"""Sites on bad lines: one whose link is cut in the middle of a round, one that is slow. Same bits as on good ones."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from institutions import (
    SERVER,
    is_asked,
    is_up,
    make_data,
    pid_of,
    provision,
    rounds,
    run_folders,
    simulated,
)
from namespaces import NEEDED, Namespace, available
from processes import Sandbox
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,  # some two minutes on two cores, half a minute of which the link is down
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not available(), reason=NEEDED),
]

SITES = ("client-000", "client-001")
CUT, SLOW = SITES
CUT_S = 30.0
SETTINGS = {
    "rounds": 3,
    "samples": 16,
    "batch-size": 8,
    "holdout": 0.0,
    "evaluate-every": 0,
    "final-samples": 8,
    "rank": 4,
    "rule": "fedavg",
    "round-timeout": 300.0,
}
Wait = Callable[[Callable[[], bool], float, str], None]


@pytest.fixture
def lines() -> Iterator[dict[str, Namespace]]:
    with ExitStack() as stack:
        yield {site: stack.enter_context(Namespace(number)) for number, site in enumerate(SITES, 101)}


def test_a_link_is_cut_for_half_a_minute_and_another_is_slow(
    sandbox: Sandbox, wait_for: Wait, lines: dict[str, Namespace]
) -> None:
    data, address = sandbox.folder / "data", lines[CUT].outside
    make_data(data, SITES)
    provision(sandbox, SITES, data=data / "sites", address=address)
    server = sandbox.start("fednano", "server", "up", name="server")
    settings = {**SETTINGS, "dataset": str(data)}
    expected = simulated(sandbox.folder / "reference", settings, clients=2)
    wait_for(lambda: is_up(sandbox), 300, "the server")
    # What the slow site takes for the server is a relay at its own end of the line.
    plan = json.loads((sandbox.folder / SERVER / "federation.json").read_text())
    ports = ",".join(str(plan[door]).rpartition(":")[2] for door in ("fleet", "host"))
    slow = lines[SLOW]
    slow.within("addr", "add", f"{address}/32", "dev", "lo")
    relay = Path(__file__).with_name("namespaces.py")
    options = (address, slow.outside, ports, "0.02", "40", "1.5")
    sandbox.start(*slow.command(sys.executable, "-P", str(relay), *options), name="relay")
    clients = [
        sandbox.start(*lines[site].command("fednano", "client", "up", "--bundle", site), name=site)
        for site in SITES
    ]
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    running = sandbox.start("fednano", "run", "--json", *words, name="order")

    wait_for(lambda: rounds(sandbox) >= 1, 600, "round 1")
    wait_for(lambda: is_asked(sandbox, CUT, 2), 60, "the requests of round 2")
    lines[CUT].cut()
    time.sleep(CUT_S)
    assert rounds(sandbox) == 1  # the round waits for the site that cannot be reached
    lines[CUT].mend()
    assert running.wait(900) == 0, sandbox.logs()

    (run,) = run_folders(sandbox)
    ours = load_file(run / "adapter.safetensors")
    assert set(ours) == set(expected)
    assert all(ours[name].equal(expected[name]) for name in expected)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    merged = {(r["client"], r["round"]) for r in records if r.get("scope") == "client" and "refused" not in r}
    assert merged >= {(site, number) for site in SITES for number in (1, 2, 3)}
    for process in (*clients, server):
        os.kill(process.pid, signal.SIGTERM)
    assert [process.wait(60) for process in (*clients, server)] == [0, 0, 0]
    assert pid_of(sandbox, "host") == 0
