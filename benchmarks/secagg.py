"""Secure aggregation at 10, 100 and 1,000 clients with 1 MB updates: writes ``benchmarks/results/secagg.json``.

    .venv/bin/python benchmarks/secagg.py [--clients 10 100 1000] [--timed 5]

One thread, on a quiet machine. For each number of clients a whole session runs in this process, client by client: a
FedAvg update of 262,144 float32 from each, a tenth of the clients lost before they send their masked update and another
tenth after. The sum must equal the sum of the survivors' vectors in every word.

The peer is SecAgg+ as flwr ships it for its legacy API (`flwr.client.mod`, NumPy): the four stages of one client, in
the same run and interleaved with ours, with the same update, as many neighbours and the same threshold. Its neighbours
are played by keys and encrypted shares of the right sizes; what they cost is not counted. Its masks come from 32-bit
seeds, so its security is at most that; ours are not weakened to match. Training and the network are no part of either.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from results import Gate, write_results

from fednano.aggregation import LeafSpec, Spec, Update, create_rule, layout_of, vector_of
from fednano.privacy.secagg import Client, Server

RESULTS = Path(__file__).parent / "results" / "secagg.json"
ELEMENTS = 262_144
THRESHOLD = 0.6
RULE = create_rule("fedavg")
SPEC = Spec({"adapter": LeafSpec((ELEMENTS,))}, max_clients=2048)
LAYOUT = layout_of(RULE, SPEC, {})


def update_of(number: int) -> torch.Tensor:
    """A client's trained leaf, ``(ELEMENTS,)``."""
    return torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(number)) * 0.02


def words_of(number: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return vector_of(LAYOUT, RULE, SPEC, {}, Update(f"c{number}", 0, 300.0, {"adapter": update_of(number)}))


class Clock:
    """Seconds of one client, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, call: Any) -> Any:
        began = time.perf_counter()
        result = call()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
        return result

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def stored(client: Client) -> Client:
    """As between two messages, where a client's process ends."""
    return Client.from_json(json.loads(json.dumps(client.to_json())))


def flower_client(server: Server, number: int) -> Clock:
    """One client of flwr's legacy SecAgg+ in a session of the same plan."""
    from flwr.app import ConfigRecord
    from flwr.common import ndarrays_to_parameters
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
    from flwr.common.secure_aggregation.secaggplus_constants import Key
    from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
    from flwr.supercore.primitives.asymmetric import (
        bytes_to_public_key,
        generate_key_pairs,
        public_key_to_bytes,
    )

    # Its package exports the mod under the module's name.
    peer: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    assert server.plan is not None
    holders, threshold = server.plan.degree + 1, server.plan.threshold
    neighbours = range(1, holders)
    pairs = {v: (generate_key_pairs(), generate_key_pairs()) for v in neighbours}
    setup: dict[str, Any] = {
        Key.SAMPLE_NUMBER: server.plan.clients,
        Key.SHARE_NUMBER: holders,
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: 8.0,
        Key.TARGET_RANGE: 1 << 22,
        Key.MOD_RANGE: 1 << 32,
        Key.MAX_WEIGHT: 1000.0,
    }
    state, clock = peer.SecAggPlusState(), Clock()
    state.nid = 0

    def kept() -> bool:
        nonlocal state
        state = peer.SecAggPlusState(**ConfigRecord(state.to_dict()))
        return True

    clock("keys", lambda: (peer._setup(state, ConfigRecord(setup)), kept()))
    own = [state.pk1, state.pk2]
    publics = {str(v): [public_key_to_bytes(pk) for _, pk in pairs[v]] for v in neighbours}
    told = {"0": own, **publics}
    sent = clock("shares", lambda: (peer._share_keys(state, told), kept()))[0]
    share_bytes = len(state.sk1_share_dict[0]), len(state.rd_seed_share_dict[0])
    mine = bytes_to_public_key(state.pk2)
    ciphers = []
    for v in neighbours:
        key = generate_shared_key(pairs[v][1][0], mine)
        plain = share_keys_plaintext_concat(v, 0, os.urandom(share_bytes[1]), os.urandom(share_bytes[0]))
        ciphers.append(encrypt(key, plain))
    received = {Key.CIPHERTEXT_LIST: ciphers, Key.SOURCE_LIST: list(neighbours)}
    parameters = ndarrays_to_parameters([update_of(number).numpy()])
    masked = clock(
        "masked", lambda: (peer._collect_masked_vectors(state, received, 300, parameters), kept())
    )[0]
    asked = {Key.ACTIVE_NODE_ID_LIST: [0, *neighbours], Key.DEAD_NODE_ID_LIST: []}
    clock("reveal", lambda: (peer._unmask(state, asked), kept()))
    assert len(sent[Key.CIPHERTEXT_LIST]) == holders - 1
    assert len(masked[Key.MASKED_PARAMETERS]) == 2
    return clock


def session(count: int, timed: int) -> dict[str, Any]:
    """One whole session of ``count`` clients, with ``timed`` clients of the peer between."""
    server, clocks = Server(LAYOUT.length, THRESHOLD), [Clock() for _ in range(count)]
    clients = [Client(server.session) for _ in range(count)]
    for u in range(count):
        server.admit(clocks[u]("keys", clients[u].keys))
    plan = server.connect()
    up = down = 0
    for u in range(count):
        near = server.neighbours(u)
        client = clients[u] = clocks[u]("shares", lambda u=u: stored(clients[u]))
        sealed = clocks[u](
            "shares", lambda client=client, u=u, near=near: client.shares(u, near, plan.threshold)
        )
        server.shared(u, sealed)
        if u == 0:
            up += 96 + sum(map(len, sealed.values()))
            down += 96 * len(near)
    tenth = count // 10
    lost_before, lost_after = set(range(tenth)), set(range(tenth, 2 * tenth))
    expected = np.zeros(LAYOUT.length, np.uint64)
    every = max(1, (count - tenth) // timed)
    peers: list[Any] = []
    for place, u in enumerate(sorted(set(range(count)) - lost_before)):
        words = clocks[u]("fixed point", lambda u=u: words_of(u))
        client = clients[u] = clocks[u]("masked", lambda u=u: stored(clients[u]))
        masked = clocks[u](
            "masked", lambda u=u, words=words, client=client: client.mask(words, server.active(u))
        )
        expected += words
        server.add(u, masked)
        if place % every == 0 and len(peers) < timed:
            peers.append(flower_client(server, u))
    up += masked.nbytes
    for u in sorted(set(server.merged) - lost_after):
        alive, received = server.survivors(u), server.received(u)
        shares = clocks[u](
            "reveal", lambda u=u, alive=alive, got=received: stored(clients[u]).reveal(alive, got)
        )
        server.revealed(u, shares)
    up += sum(map(len, shares.values()))
    down += sum(map(len, received.values()))
    began = time.perf_counter()
    total = server.total()
    unmasking = time.perf_counter() - began
    whole = [clock for u, clock in enumerate(clocks) if u not in lost_before | lost_after]
    ours, theirs = median(clock.total for clock in whole), median(clock.total for clock in peers)
    stages = {name: median(clock.seconds[name] for clock in whole) for name in whole[0].seconds}
    return {
        "clients": count,
        "neighbours": plan.degree,
        "threshold": plan.threshold,
        "lost": len(lost_before | lost_after),
        "wrong_words": int(np.count_nonzero(total != expected)),
        "seconds_client": ours,
        **{f"seconds_{name.replace(' ', '_')}": value for name, value in stages.items()},
        "seconds_server_a_client": unmasking / count,
        "bytes_up": up,
        "bytes_down": down,
        "bytes_up_over_fp32": up / (4 * ELEMENTS),
        "flower_seconds_client": theirs,
        **{f"flower_seconds_{k}": median(c.seconds[k] for c in peers) for k in peers[0].seconds},
        "flower_timed": len(peers),
        "times_faster_than_flower": theirs / ours,
    }


def main() -> None:
    """Measure, print, and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--timed", type=int, default=5, help="clients of the peer for each number of clients")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rows = []
    for count in given.clients:
        rows.append(session(count, given.timed))
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()))
    gates = []
    for row in rows:
        n = row["clients"]
        gates += [
            Gate(f"wrong_words_with_dropouts_at_{n}", row["wrong_words"], 0, "<="),
            Gate(f"seconds_a_client_at_{n}", row["seconds_client"], 1.0, "<="),
            Gate(f"times_faster_than_flower_at_{n}", row["times_faster_than_flower"], 3.0, ">="),
        ]
    if not given.dry:
        write_results(RESULTS, rows=rows, gates=gates)
    for gate in gates:
        print(f"{'met   ' if gate.met else 'MISSED'} {gate.name}: {gate.value:.4g} {gate.sense} {gate.bound}")


if __name__ == "__main__":
    main()
