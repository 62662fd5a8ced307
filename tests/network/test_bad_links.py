"""Sites on bad lines: one whose link is cut in the middle of a round, one that is slow and loses packets. Same bits."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from institutions import (
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
CUT, LOSSY = SITES
CUT_S = 30.0
LOSS, DELAY_S = 0.02, 0.03  # of each packet, one way: a poor line over a continent
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
        yield {
            CUT: stack.enter_context(Namespace(101)),
            LOSSY: stack.enter_context(Namespace(102, loss=LOSS, delay=DELAY_S)),
        }


def test_a_link_is_cut_for_half_a_minute_and_another_loses_packets(
    sandbox: Sandbox, wait_for: Wait, lines: dict[str, Namespace]
) -> None:
    data, address = sandbox.folder / "data", lines[CUT].outside
    make_data(data, SITES)
    provision(sandbox, SITES, data=data / "sites", address=address)  # both reach this machine by that address
    server = sandbox.start("fednano", "server", "up", name="server")
    settings = {**SETTINGS, "dataset": str(data)}
    expected = simulated(sandbox.folder / "reference", settings, clients=2)
    wait_for(lambda: is_up(sandbox), 300, "the server")
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
    dropped, passed = lines[LOSSY].lost()
    assert passed > 500, "the site took another way"
    assert 0.5 * LOSS < dropped / (dropped + passed) < 2 * LOSS
