"""The protocol of secure aggregation: exact sums, silence below the threshold, masks that say nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fednano.errors import ConfigError
from fednano.privacy.secagg import BelowThreshold, Client, Plan, ProtocolError, Server, plan, server
from fednano.privacy.secagg.graph import neighbourhoods, threshold_of
from fednano.privacy.secagg.keys import Public
from fednano.privacy.secagg.ring import U64, add_mask
from fednano.privacy.secagg.shamir import PRIME, SHARE_BYTES, combine, recover, split


@dataclass
class Session:
    """A session with all clients in this process; each client is stored and loaded between its answers."""

    count: int
    length: int = 7
    share: float = 0.6
    seed: int = 0
    vectors: list[U64] = field(init=False)
    server: Server = field(init=False)
    clients: list[Client] = field(init=False)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        words = draw.integers(-(2**62), 2**62, (self.count, self.length))
        self.vectors = list(words.view(np.uint64))
        self.server = Server(self.length, self.share)
        self.server.session = hashlib.sha256(b"session %d" % self.seed).digest()
        masters = [hashlib.sha256(b"%d %d" % (self.seed, u)).digest() for u in range(self.count)]
        self.clients = [Client(self.server.session, master) for master in masters]

    def stored(self, u: int) -> Client:
        self.clients[u] = Client.from_json(self.clients[u].to_json())
        return self.clients[u]

    def until_masked(self, *, after_keys: Collection[int] = (), before_masking: Collection[int] = ()) -> None:
        server = self.server
        for u in range(self.count):
            assert server.admit(self.clients[u].keys()) == u
        threshold = server.connect().threshold
        for u in set(range(self.count)) - set(after_keys):
            server.shared(u, self.stored(u).shares(u, server.neighbours(u), threshold))
        for u in set(range(self.count)) - set(after_keys) - set(before_masking):
            server.add(u, self.stored(u).mask(self.vectors[u], server.active(u)))

    def reveal(self, silent: Collection[int] = ()) -> None:
        for u in set(self.server.merged) - set(silent):
            shares = self.stored(u).reveal(self.server.survivors(u), self.server.received(u))
            self.server.revealed(u, shares)

    def expected(self, without: Collection[int] = ()) -> U64:
        return np.sum(
            [self.vectors[u] for u in range(self.count) if u not in set(without)], axis=0, dtype=np.uint64
        )


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_the_sum_is_exact_whoever_drops_out_and_when(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 9), label="clients")
    length = data.draw(st.sampled_from([1, 8, 33, 32768 + 5]), label="length")
    session = Session(count, length, seed=data.draw(st.integers(0, 5), label="seed"))
    may = count - threshold_of(count, session.share)
    lost = data.draw(st.lists(st.integers(0, count - 1), max_size=may, unique=True), label="lost")
    when = [data.draw(st.sampled_from(["keys", "mask", "reveal"]), label="when") for _ in lost]
    early = [u for u, at in zip(lost, when, strict=True) if at == "keys"]
    late = [u for u, at in zip(lost, when, strict=True) if at == "mask"]
    session.until_masked(after_keys=early, before_masking=late)
    session.reveal(silent=[u for u, at in zip(lost, when, strict=True) if at == "reveal"])
    assert np.array_equal(session.server.total(), session.expected(without=[*early, *late]))


@pytest.mark.parametrize("stage", ["before masking", "after masking"])
def test_a_sparse_graph_adds_up_as_well(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "plan", lambda clients, share: Plan(clients, 8, 5, 18))
    session = Session(30, 3)
    lost = [3, 11, 27]
    session.until_masked(before_masking=lost if stage == "before masking" else [])
    session.reveal(silent=lost if stage == "after masking" else [])
    missing = set(range(30)) - set(session.server.merged)
    assert missing == (set(lost) if stage == "before masking" else set())
    assert np.array_equal(session.server.total(), session.expected(without=missing))


@pytest.mark.parametrize("lost", [3, 4, 5])
def test_below_the_threshold_there_is_no_sum(lost: int) -> None:
    session = Session(5)
    session.until_masked(before_masking=range(lost))
    with pytest.raises(BelowThreshold, match=f"{5 - lost} of 5 clients"):
        session.server.require()
    for u in session.server.merged:  # and clients reveal nothing
        with pytest.raises(BelowThreshold, match="3 are needed"):
            session.clients[u].reveal(session.server.survivors(u), session.server.received(u))
    with pytest.raises(BelowThreshold):
        session.server.total()


def test_too_few_shares_at_the_end_give_no_sum() -> None:
    session = Session(5)
    session.until_masked()
    session.reveal(silent=[0, 1, 2])
    with pytest.raises(BelowThreshold, match="2 shares of a secret are left, 3 are needed"):
        session.server.total()


def test_too_few_neighbours_that_shared_stop_a_client_before_it_masks() -> None:
    session = Session(5)
    with pytest.raises(BelowThreshold, match="2 holders"):
        session.until_masked(after_keys=[0, 1, 2])


@pytest.mark.parametrize("plain", ["zeros", "ones", "an adapter"])
def test_a_masked_message_is_indistinguishable_from_uniform(plain: str) -> None:
    session = Session(5, length=1 << 16)
    small = np.random.default_rng(1).normal(0, 1e6, 1 << 16).astype(np.int64).view(np.uint64)
    session.vectors[2] = {"zeros": small * 0, "ones": small * 0 + 1, "an adapter": small}[plain]
    seen: list[U64] = []
    real = session.server.add

    def spy(u: int, masked: U64) -> None:
        seen.append(masked)
        real(u, masked)

    session.server.add = spy  # type: ignore[method-assign]
    session.until_masked()
    masked = seen[2]
    counts = np.bincount(masked.view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4  # bytes, all 524,288
    for place in range(
        8
    ):  # and at each place of a word: the sign and high bytes of small numbers are constant
        counts = np.bincount(masked.view(np.uint8)[place::8], minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.kstest(masked / 2.0**64, "uniform").pvalue > 1e-4
    pairs = np.bincount((masked[1:] >> np.uint64(60)) * 16 + (masked[:-1] >> np.uint64(60)), minlength=256)
    assert stats.chisquare(pairs).pvalue > 1e-4  # neighbours in the vector
    other = (masked - session.vectors[2]) >> np.uint64(60)
    against = np.bincount((masked >> np.uint64(60)) * 16 + (session.vectors[2] >> np.uint64(60)))
    assert against[against > 0].size >= 16
    assert len(np.unique(other)) == 16
    # Two sessions of the same client have nothing in common.
    again = Session(5, length=1 << 16, seed=1)
    again.vectors[2] = session.vectors[2]
    seen.clear()
    again.server.add = lambda u, masked: seen.append(masked)  # type: ignore[method-assign]
    again.until_masked()
    assert stats.chisquare(np.bincount((seen[2] ^ masked).view(np.uint8), minlength=256)).pvalue > 1e-4


def test_masks_are_chacha20_of_rfc_8439() -> None:
    """The keystream of appendix A.1, test vector 1: key, nonce and counter zero."""
    vector = np.zeros(8, np.uint64)
    add_mask(vector, bytes(32), 1)
    expected = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert vector.astype("<u8").tobytes().hex() == expected
    add_mask(vector, bytes(32), -1)
    assert not vector.any()


@settings(deadline=None, max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.integers(0, 6), st.randoms())
def test_any_t_shares_give_the_secret(secret: bytes, threshold: int, more: int, random: object) -> None:
    draw = np.random.default_rng(int.from_bytes(secret[:4], "big"))
    holders = [int(x) + 1 for x in draw.choice(200, threshold + more, replace=False)]
    shares = split(secret, [draw.bytes(48) for _ in range(threshold - 1)], holders)
    some = {holders[i]: shares[i] for i in draw.choice(len(holders), threshold, replace=False)}
    assert combine(some, threshold, {}) == secret
    if threshold > 1:
        some.popitem()
        with pytest.raises(BelowThreshold):
            combine(some, threshold, {})


def test_fewer_shares_fit_every_secret() -> None:
    """t - 1 shares and any candidate for the secret lie on one polynomial, so they rule nothing out."""
    shares = split(b"a" * 32, [b"b" * 48, b"c" * 48], [1, 2])
    known = dict(zip([1, 2], shares, strict=True))
    guess = int.from_bytes(b"z" * 32, "little")
    # f(3) of the parabola through (0, guess), (1, f1), (2, f2), by Lagrange
    first, second = (int.from_bytes(known[x], "little") for x in (1, 2))
    third = (guess - 3 * first + 3 * second) % PRIME
    known[3] = third.to_bytes(SHARE_BYTES, "little")
    assert combine(known, 3, {}) == b"z" * 32


def test_wrong_shares_are_refused_and_one_too_many_is_borne() -> None:
    secret, holders = b"s" * 32, [1, 2, 3, 4, 5]
    good = dict(zip(holders, split(secret, [b"x" * 48, b"y" * 48], holders), strict=True))

    def right(found: bytes) -> bool:
        return found == secret

    bent = {**good, 2: bytes(SHARE_BYTES)}
    assert recover(bent, 3, right, {}) == secret
    with pytest.raises(ProtocolError, match="inconsistent"):
        recover({x: bent[x] for x in (1, 2, 3)}, 3, right, {})
    for malformed in (b"", b"\xff" * SHARE_BYTES, good[1] + b"\0"):
        with pytest.raises(ProtocolError, match="a share"):
            combine({**good, 1: malformed}, 3, {})


def test_a_lie_about_a_secret_stops_the_sum() -> None:
    session = Session(3)
    session.until_masked()
    session.reveal()
    for shares in session.server._revealed.values():
        for holder in shares:
            shares[holder] = bytes(SHARE_BYTES)
    with pytest.raises(ProtocolError, match="committed"):
        session.server.total()


def test_shares_changed_on_the_way_are_left_out() -> None:
    session = Session(5)
    session.until_masked()
    received = session.server.received(1)
    received[0] = received[0][:-1] + bytes([received[0][-1] ^ 1])
    received[2], received[3] = (
        received[3],
        received[2],
    )  # meant for the same receiver, but not from this sender
    shares = session.clients[1].reveal(session.server.survivors(1), received)
    assert set(shares) == {1, 4}


def test_a_client_reveals_a_share_of_the_seed_or_of_the_key_once() -> None:
    session = Session(5)
    session.until_masked()
    client, received = session.clients[0], session.server.received(0)
    client.reveal([0, 1, 2, 3], received)
    for survivors in ([0, 1, 2, 3], [0, 1, 2, 4]):
        with pytest.raises(ProtocolError, match="once"):
            client.reveal(survivors, received)


@pytest.mark.parametrize("call", ["keys", "shares", "mask"])
def test_no_exchange_is_answered_twice(call: str) -> None:
    session = Session(3)
    session.until_masked()
    client = session.stored(0)
    with pytest.raises(ProtocolError, match="once"):
        {
            "keys": client.keys,
            "shares": lambda: client.shares(0, client.neighbours, 2),
            "mask": lambda: client.mask(session.vectors[0], [1, 2]),
        }[call]()


def test_a_client_refuses_what_would_undo_its_protection() -> None:
    session = Session(4)
    publics = [client.keys() for client in session.clients]
    near = dict(enumerate(publics[1:], 1))
    for threshold in (0, 1, 2, 5):  # half of the holders or less, or more than there are
        with pytest.raises(ProtocolError, match="more than half"):
            session.clients[0].shares(0, near, threshold)
    for double in (publics[0], publics[1]):
        with pytest.raises(ProtocolError, match="counted twice"):
            session.clients[0].shares(0, {1: publics[1], 2: double}, 2)
    with pytest.raises(ProtocolError, match="degenerate"):
        session.clients[0].shares(0, {**near, 1: Public(bytes(32), b"m" * 32, bytes(32))}, 3)
    session = Session(4)
    session.until_masked()
    client, received = session.clients[0], session.server.received(0)
    for survivors in ([1, 2, 3], [0, 1, 2, 9]):
        with pytest.raises(ProtocolError, match="survive"):
            client.reveal(survivors, received)


def test_the_server_refuses_what_does_not_belong() -> None:
    session = Session(4)
    server, client = session.server, session.clients[0]
    public = client.keys()
    server.admit(public)
    with pytest.raises(ProtocolError, match="same public keys"):
        server.admit(public)
    with pytest.raises(BelowThreshold, match="at least 2"):
        server.connect()
    for other in session.clients[1:]:
        server.admit(other.keys())
    threshold = server.connect().threshold
    sealed = client.shares(0, server.neighbours(0), threshold)
    with pytest.raises(ProtocolError, match="neighbours"):
        server.shared(0, {1: sealed[1]})
    with pytest.raises(ProtocolError, match="nobody waits"):
        server.add(0, np.zeros(7, np.uint64))
    server.shared(0, sealed)
    for wrong in (np.zeros(6, np.uint64), np.zeros(7, np.int64), np.zeros((7, 1), np.uint64)):
        with pytest.raises(ProtocolError, match="expected uint64"):
            server.add(0, wrong)
    server.add(0, np.zeros(7, np.uint64))
    with pytest.raises(ProtocolError, match="nobody waits"):
        server.add(0, np.zeros(7, np.uint64))
    with pytest.raises(ProtocolError, match="does not hold"):
        server.revealed(0, {3: bytes(SHARE_BYTES)})


def test_damaged_state_is_told() -> None:
    with pytest.raises(ProtocolError, match="damaged"):
        Client.from_json({"session": "zz"})
    with pytest.raises(ProtocolError, match="96 bytes"):
        Public.from_bytes(b"short")


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 3000), st.floats(0.51, 0.95))
def test_plans_keep_their_promises(clients: int, share: float) -> None:
    made = plan(clients, share)
    holders = made.degree + 1
    assert holders / 2 < made.threshold <= holders
    assert clients * share <= made.least + 1e-6
    if made.degree == clients - 1:
        return
    assert made.degree % 2 == 0
    corrupt, lost = int(clients * share / 2), int(clients * (1 - share) / 2)
    taken = stats.hypergeom.sf(made.threshold - 1, clients - 1, corrupt, made.degree)
    short = stats.hypergeom.sf(holders - made.threshold, clients - 1, lost, made.degree)
    assert clients * taken < 2.0**-40
    assert clients * short < 2.0**-29


@settings(deadline=None, max_examples=20)
@given(st.integers(3, 60), st.integers(1, 20))
def test_the_graph_is_regular_symmetric_and_connected(clients: int, half: int) -> None:
    degree = min(2 * half, clients - 1)
    graph = neighbourhoods(clients, degree, np.random.default_rng(clients))
    assert all(len(set(near)) == degree and u not in near for u, near in enumerate(graph))
    assert all(u in graph[v] for u, near in enumerate(graph) for v in near)
    reached, edge = {0}, [0]
    while edge:
        edge = [v for u in edge for v in graph[u] if v not in reached and not reached.add(v)]  # type: ignore[func-returns-value]
    assert len(reached) == clients


@pytest.mark.parametrize(("clients", "share"), [(1, 0.6), (5, 0.5), (5, 1.1)])
def test_bad_plans_are_refused(clients: int, share: float) -> None:
    with pytest.raises(ConfigError):
        plan(clients, share)
