"""The audit log: whole whatever ends its writers, and any change of it is found."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.errors import ReceiptInvalid
from fednano.security.audit import AuditLog, Auditor
from fednano.security.keys import Signer, create_key, load_signer


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return create_key(tmp_path, "audit")


def filled(folder: Path, signer: Signer, events: int = 6) -> AuditLog:
    log = AuditLog(folder / "audit.jsonl", "hospitals")
    for number in range(events):
        log.record(signer, "token", number=number, site="ä" * number)
    return log


def test_events_come_back_in_order(tmp_path: Path, signer: Signer) -> None:
    log = filled(tmp_path, signer)
    entries = log.verify(signer.public)
    assert [entry["details"]["number"] for entry in entries] == list(range(6))
    assert log.head().startswith("6:")


@given(at=st.integers(0, 1 << 20), change=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, at: int, change: int) -> None:
    folder = tmp_path_factory.mktemp("audit")
    signer = create_key(folder, "audit")
    log = filled(folder, signer, 3)
    content = bytearray(log.path.read_bytes())
    content[at % len(content)] ^= change
    log.path.write_bytes(content)
    with pytest.raises(ReceiptInvalid):
        log.verify(signer.public)


def test_lines_dropped_swapped_or_cut_off_are_found(tmp_path: Path, signer: Signer) -> None:
    log = filled(tmp_path, signer)
    lines, head = log.path.read_bytes().splitlines(keepends=True), log.head()
    for wrong in ([*lines[:2], *lines[3:]], [lines[1], lines[0], *lines[2:]], lines[1:], [*lines, lines[-1]]):
        log.path.write_bytes(b"".join(wrong))
        with pytest.raises(ReceiptInvalid):
            log.verify(signer.public)
    log.path.write_bytes(b"".join(lines[:4]))
    log.verify(signer.public)  # a valid shorter log ...
    with pytest.raises(ReceiptInvalid, match="does not contain the head"):
        log.verify(signer.public, head)  # ... which the head of an earlier check gives away
    log.path.write_bytes(b"".join(lines))
    log.record(signer, "more")
    assert len(log.verify(signer.public, head)) == 7


def test_what_a_killed_writer_left_is_cut_away(tmp_path: Path, signer: Signer) -> None:
    log = filled(tmp_path, signer)
    with log.path.open("ab") as file:
        file.write(b'{"details":{"half')
    log.record(signer, "after")
    assert [entry["kind"] for entry in log.verify(signer.public)][-1] == "after"


def test_another_federations_log_or_key_does_not_pass(tmp_path: Path, signer: Signer) -> None:
    log = filled(tmp_path, signer)
    with pytest.raises(ReceiptInvalid):
        AuditLog(log.path, "banks").verify(signer.public)
    with pytest.raises(ReceiptInvalid, match="signature is not the server's"):
        log.verify(create_key(tmp_path, "other").public)


def _write(folder: Path, name: str) -> None:
    auditor = Auditor(AuditLog(folder / "audit.jsonl", "hospitals"), folder / "audit.key")
    for number in range(15):
        auditor.record("event", writer=name, number=number)


def test_several_processes_write_one_chain(tmp_path: Path, signer: Signer) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, f"w{i}")) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    entries = AuditLog(tmp_path / "audit.jsonl", "hospitals").verify(
        load_signer(tmp_path / "audit.key").public
    )
    for name in ("w0", "w1", "w2"):
        own = [entry["details"]["number"] for entry in entries if entry["details"]["writer"] == name]
        assert own == list(range(15))


def test_a_long_log_is_appended_to_without_reading_it(tmp_path: Path, signer: Signer) -> None:
    log = filled(tmp_path, signer, 2)
    long = "x" * 200_000  # longer than what is read at a time
    log.record(signer, "long", text=long)
    assert log.chain.tail()[1:] == log.chain.head()
    log.record(signer, "after")
    assert len(log.verify(signer.public)) == 4


def test_without_a_log_nothing_is_recorded(tmp_path: Path) -> None:
    Auditor().record("event")
    assert not list(tmp_path.iterdir())
