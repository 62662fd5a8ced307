"""Receipts and their log: any change is found, by whoever holds the server's public key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_world import FakeRunner, World

from fednano.errors import ReceiptInvalid, RunError
from fednano.security.canonical import canonical, parse_canonical, sha256_hex
from fednano.security.keys import create_key
from fednano.unlearning.jobs.ledger import Ledger
from fednano.unlearning.jobs.receipt import available, check_discreet, sign_receipt, verify_receipt
from fednano.unlearning.jobs.views import check_job
from fednano.unlearning.jobs.work import work


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run with three committed jobs; tests must not change it."""
    made = World(tmp_path_factory.mktemp("world"))
    for start in (0, 3, 6):
        made.desk.submit(made.request(ids=made.ids(start=start, count=2)), actor="test")
        work(made.desk, FakeRunner(), made.server)
    return made


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_changed_byte_of_a_receipt_is_found(data: st.DataObject, world: World) -> None:
    content = bytearray(world.place.receipt("u0002").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    with pytest.raises(ReceiptInvalid):
        verify_receipt(bytes(content), world.server.public)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_changed_byte_of_the_log_is_found(data: st.DataObject, world: World) -> None:
    content = bytearray((world.place.root / "log.jsonl").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    copy = world.folder / "changed.jsonl"
    copy.write_bytes(bytes(content))
    with pytest.raises(ReceiptInvalid):
        Ledger(copy, "toy").verify(world.server.public)


@given(junk=st.binary(max_size=8), place=st.integers(0, 3000), cut=st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_inserted_and_removed_bytes_are_found(junk: bytes, place: int, cut: int, world: World) -> None:
    content = world.place.receipt("u0001").read_bytes()
    place = min(place, len(content))
    changed = content[:place] + junk + content[place + cut :]
    if changed != content:
        with pytest.raises(ReceiptInvalid):
            verify_receipt(changed, world.server.public)


def test_lines_cannot_be_dropped_swapped_or_taken_from_another_run(world: World, tmp_path: Path) -> None:
    lines = (world.place.root / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    path = tmp_path / "log.jsonl"
    for changed in (lines[1:], [lines[0], lines[2]], [lines[1], lines[0], lines[2]], [*lines, lines[2]]):
        path.write_bytes(b"".join(changed))
        with pytest.raises(ReceiptInvalid):
            Ledger(path, "toy").verify(world.server.public)
    path.write_bytes(b"".join(lines))
    assert len(Ledger(path, "toy").verify(world.server.public)) == 3
    with pytest.raises(ReceiptInvalid, match="of run 'toy'"):
        Ledger(path, "other").verify(world.server.public)


def test_a_log_that_was_cut_is_shown_by_the_receipts(world: World, tmp_path: Path) -> None:
    lines = (world.place.root / "log.jsonl").read_bytes().splitlines(keepends=True)
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(lines[:2]))
    content = world.place.receipt("u0003").read_bytes()
    assert verify_receipt(content, world.server.public)["job"] == "u0003"
    with pytest.raises(ReceiptInvalid, match="the log was cut"):
        verify_receipt(content, world.server.public, log=path)
    with pytest.raises(ReceiptInvalid, match="no log"):
        verify_receipt(content, world.server.public, log=tmp_path / "none")


def test_a_log_rewritten_with_another_key_is_found(world: World, tmp_path: Path) -> None:
    mallory = create_key(tmp_path, "server")
    forged = Ledger(tmp_path / "log.jsonl", "toy")
    body = parse_canonical(world.place.receipt("u0001").read_bytes()[:-1])["receipt"]
    index, previous = forged.head()
    receipt = sign_receipt(mallory, {**body, "verdict": "nothing happened"})
    forged.append(forged.about(mallory, "receipt", "u0001", receipt, index=index, previous=previous))
    assert forged.verify(mallory.public)
    with pytest.raises(ReceiptInvalid, match="not the server's"):
        forged.verify(world.server.public)
    with pytest.raises(ReceiptInvalid, match="the key given"):
        verify_receipt(receipt, world.server.public)
    relabelled = json.loads(receipt) | {"public_key": world.server.public}
    with pytest.raises(ReceiptInvalid, match="does not fit"):
        verify_receipt(canonical(relabelled) + b"\n", world.server.public)


def test_a_line_torn_by_a_kill_is_named_and_then_replaced(world: World, tmp_path: Path) -> None:
    log = Ledger(tmp_path / "log.jsonl", "toy")
    for number in range(3):
        index, previous = log.head()
        line = log.about(world.server, "receipt", f"u{number}", b"x", index=index, previous=previous)
        log.append(line)
        log.append(line)  # repeating a step changes nothing
        with log.path.open("ab") as file:
            file.write(line[: 5 * number])
        if number:
            with pytest.raises(ReceiptInvalid, match="ends within a line"):
                log.verify(world.server.public)
    assert log.head()[0] == 3
    other = log.about(world.server, "receipt", "other", b"y", index=1, previous=sha256_hex(b""))
    with pytest.raises(ReceiptInvalid, match="line 2 is not the line"):
        log.append(other)


def test_the_operators_check_finds_what_was_touched(tmp_path: Path) -> None:
    world = World(tmp_path)
    job = world.desk.submit(world.request(), actor="test")[0]
    (job,) = work(world.desk, FakeRunner(), world.server)

    def wrong() -> set[str]:
        return {row["check"] for row in check_job(world.place, job, world.server.public) if not row["holds"]}

    assert wrong() == set()
    receipt = world.place.receipt(job.id)
    content = receipt.read_bytes()
    receipt.write_bytes(content.replace(b'"committed"', b'"cOmmitted"', 1))
    assert wrong() == {"the receipt is signed by the server and stands in the log"}
    receipt.write_bytes(content)
    tombstones = world.run / "unlearning/tombstones.json"
    body = json.loads(tombstones.read_text())
    body["sets"][0]["hashes"].pop()
    tombstones.write_text(json.dumps(body))
    world.write_adapter(1.0)
    assert wrong() == {"tombstones hold every sample", "the adapter is not the one of before"}
    (world.run / "adapter.safetensors").write_bytes(b"x")
    assert "the adapter is whole" in wrong()


def test_figures_are_numbers_or_not_available() -> None:
    figures = {"a": float("inf"), "b": [], "c": {}, "d": [None, 1.5], "e": True, "f": {"g": None}}
    expected = {"a": "not available", "b": "not available", "c": "not available", "d": ["not available", 1.5]}
    assert available(figures) == expected | {"e": True, "f": {"g": "not available"}}
    assert available({}) == "not available"
    with pytest.raises(ReceiptInvalid, match="numbers only"):
        available({"answer": "Jane Doe lives in Paris"})


def test_a_receipt_that_would_name_a_sample_is_not_written() -> None:
    with pytest.raises(ReceiptInvalid, match="clear text"):
        check_discreet(b'{"x":"patient-17"}', ["patient-17"])


def test_a_full_disk_leaves_the_log_as_it_was(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    log = Ledger(tmp_path / "log.jsonl", "toy")
    line = log.about(world.server, "receipt", "u1", b"x", index=0, previous=log.head()[1])
    log.append(line)
    before = log.path.read_bytes()
    real = os.write

    def full(handle: int, content: bytes) -> int:
        real(handle, content[:7])
        raise OSError(28, "No space left on device")

    second = log.about(world.server, "receipt", "u2", b"x", index=1, previous=sha256_hex(line))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RunError, match="No space"):
            log.append(second)
    assert log.path.read_bytes() == before
    log.append(second)
    assert len(log.verify(world.server.public)) == 2
