"""`fednano unlearn` from the command line: every command, its JSON, its exit codes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from job_world import SITES, FakeHoldings, FakeRunner, World, tensors
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.cli.failure import EXIT_INVALID, EXIT_MISTAKE, EXIT_REFUSED, EXIT_STATE, reported
from fednano.errors import FednanoError


class Terminal:
    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, *words: str, code: int = 0) -> str:
        """Run a command, and insist on its exit code; returns what it printed, with its error message."""
        place = [] if words[0] == "verify-receipt" else ["--runs-dir", str(self.world.run.parent)]
        if place and words[0] != "keygen":
            place += ["--run", "toy"]
        result = CliRunner().invoke(app, ["unlearn", *words, *place])
        ended, said = result.exit_code, result.output
        if isinstance(result.exception, FednanoError):
            with pytest.raises(SystemExit) as left, reported():
                raise result.exception
            ended, said = int(left.value.code or 0), f"{said}{result.exception}"
        elif result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert ended == code, said
        return said

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self(*words, "--json", code=code))


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    world = World(tmp_path)
    monkeypatch.setattr("fednano.unlearning.jobs.holdings.RunHoldings", lambda run, data: FakeHoldings())
    monkeypatch.setattr("fednano.unlearning.jobs.loku.LokuRunner", lambda data, **options: FakeRunner())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids.txt").write_text("\n".join(world.ids()) + "\n\n")
    return Terminal(world)


SUBMIT = ("submit", "--site", "client-000", "--samples", "ids.txt", "--reason", "Art. 17")


def test_from_request_to_receipt_to_purge(terminal: Terminal, tmp_path: Path) -> None:
    made = terminal.json(*SUBMIT, "--deadline", "2099-01-01")
    assert (made["job"], made["state"], made["new"]) == ("u0001", "queued", True)
    assert not terminal.json(*SUBMIT, "--deadline", "2099-01-01")["new"]
    assert [row["state"] for row in terminal.json("list")] == ["queued"]
    assert "u0001" in terminal("list")
    (done,) = terminal.json("run")
    assert done["state"] == "committed"
    assert "nothing to do" in terminal("run")
    shown = terminal.json("show", "u0001")
    assert [round_["number"] for round_ in shown["rounds"]] == [1, 2]
    assert "committed" in terminal("show", "u0001")
    assert "committed" in terminal("watch", "u0001")
    assert terminal.json("verify", "u0001")["holds"] is True
    terminal("receipt", "u0001", "--out", "receipt.json")
    assert (tmp_path / "receipt.json").read_bytes() == terminal("receipt", "u0001", "--json").encode()
    key = str(terminal.world.place.root / "server.pub")
    log = str(terminal.world.place.root / "log.jsonl")
    assert "valid: job u0001" in terminal("verify-receipt", "receipt.json", "--key", key, "--log", log)
    assert terminal.json("verify-receipt", "receipt.json", "--key", key)["receipt"]["verdict"] == "committed"
    kinds = {item["kind"] for item in terminal.json("purge-status", "u0001")}
    assert kinds == {"checkpoint", "escrow", "client"}
    moved = terminal.json("purge", "u0001")
    assert {i["status"] for i in moved if i["kind"] == "checkpoint"} == {"quarantined"}
    assert terminal.json("rollback", "u0001")["state"] == "rolled-back"
    assert terminal.world.adapter() == tensors(1.0)
    assert "ended rolled-back" in terminal("watch", "u0001", code=EXIT_STATE)
    assert "is rolled-back" in terminal("verify", "u0001", code=EXIT_INVALID)


def test_two_approvals_from_keygen_to_queue(terminal: Terminal) -> None:
    assert (
        terminal.json("submit", "--site", "client-000", "--client", "--reason", "x")["state"] == "validated"
    )
    terminal("keygen", "--approver", "cleo", "--run", "toy")
    assert "approvals: 1 of 2 cleo" in terminal("approve", "u0001", "--key", "keys/cleo.key")
    assert "another approver" in terminal("approve", "u0001", "--key", "keys/cleo.key", code=EXIT_REFUSED)
    assert "no registered approver" in terminal(
        "approve", "u0001", "--key", "keys/client-000.key", code=EXIT_REFUSED
    )
    assert terminal.json("approve", "u0001", "--key", "keys/ann.key")["state"] == "queued"
    terminal("submit", "--site", "client-000", "--class", "red", "--reason", "x")
    assert "declined by ben: no" in terminal(
        "approve", "u0002", "--key", "keys/ben.key", "--decline", "--reason", "no"
    )


def test_a_request_can_be_signed_at_the_site_and_handed_in_at_the_server(terminal: Terminal) -> None:
    terminal(*SUBMIT, "--out", "request.json")
    assert terminal("list").strip() == "none"
    text = Path("request.json").read_text()
    assert "toy/client-000" not in text
    assert terminal.json("submit", "--request", "request.json")["state"] == "queued"
    Path("request.json").write_text(text.replace('"rounds": 5', '"rounds": 6'))
    assert "does not fit" in terminal("submit", "--request", "request.json", code=EXIT_REFUSED)
    assert "does not fit" in terminal("list", "--refused")


def test_keys_of_a_site_elsewhere_are_registered_by_their_card(terminal: Terminal) -> None:
    folder = Path("elsewhere")
    terminal("keygen", "--site", "client-001", "--keys", str(folder))
    assert "is registered with the key" in terminal(
        "register", str(folder / "client-001.card.json"), code=EXIT_MISTAKE
    )
    assert "took no part" in terminal(
        "keygen", "--site", "client-007", "--keys", str(folder), "--run", "toy", code=EXIT_MISTAKE
    )
    terminal(
        "keygen", "--site", SITES[0], "--keys", "keys", "--run", "toy"
    )  # there already: registered again


def test_mistakes_and_refusals_have_their_codes(terminal: Terminal) -> None:
    Path("none.txt").write_text("\n")
    Path("foreign.txt").write_text("toy/client-001/subject-0/000\n")
    for words, code, message in [
        (("submit", "--reason", "x"), EXIT_MISTAKE, "exactly one of"),
        ((*SUBMIT, "--client"), EXIT_MISTAKE, "samples, client"),
        (("submit", "--site", "client-009", "--client", "--reason", "x"), EXIT_MISTAKE, "cannot read"),
        (
            ("submit", "--site", SITES[0], "--samples", "none.txt", "--reason", "x"),
            EXIT_MISTAKE,
            "no sample ids",
        ),
        (
            ("submit", "--site", SITES[0], "--samples", "foreign.txt", "--reason", "x"),
            EXIT_MISTAKE,
            "not this site",
        ),
        (
            ("submit", "--site", SITES[0], "--samples", "nowhere", "--reason", "x"),
            EXIT_MISTAKE,
            "cannot be read",
        ),
        (("submit", "--site", SITES[0], "--class", "green", "--reason", "x"), EXIT_MISTAKE, "blue, red"),
        ((*SUBMIT, "--key", "keys/client-001.key"), EXIT_MISTAKE, "is the key of 'client-001'"),
        ((*SUBMIT, "--deadline", "soon"), EXIT_MISTAKE, "expected 2026-01-31"),
        ((*SUBMIT, "--deadline", "2001-01-01"), EXIT_MISTAKE, "has passed"),
        ((*SUBMIT, "--method", "magic"), EXIT_REFUSED, "magic"),
        (
            ("submit", "--site", SITES[0], "--subject", "subject-1", "--reason", "x"),
            EXIT_REFUSED,
            "over quota",
        ),
        (("show", "u0099"), EXIT_STATE, "no job"),
        (("receipt", "u0001"), EXIT_STATE, "has no receipt"),
        (("purge-status", "u0001"), EXIT_STATE, "once it is committed"),
        (("rollback", "u0001"), EXIT_STATE, "only a committed job"),
        (("keygen",), EXIT_MISTAKE, "either --site"),
        (("submit", "--request", "nowhere"), EXIT_MISTAKE, "no signed request"),
        ((*SUBMIT, "--data", "x"), EXIT_MISTAKE, "expected SITE=FOLDER"),
    ]:
        assert message in terminal(*words, code=code), words


def test_a_key_that_others_can_read_is_refused(terminal: Terminal) -> None:
    Path("keys/client-000.key").chmod(0o644)
    assert "chmod 600" in terminal(*SUBMIT, code=EXIT_MISTAKE)


def test_cancelling_and_watching(terminal: Terminal) -> None:
    terminal(*SUBMIT)
    assert "is queued after" in terminal(
        "watch", "u0001", "--timeout", "0.01", "--interval", "0.05", code=EXIT_STATE
    )
    assert terminal.json("cancel", "u0001", "--reason", "never mind")["state"] == "cancelled"
    assert "has not ended" in terminal("cancel", "u0001", code=EXIT_STATE)
    assert terminal.world.adapter() == tensors(1.0)


def test_a_job_that_does_not_commit_is_told_by_the_exit_code(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = FakeRunner({"accepted": False, "reasons": ("utility fell",)})
    monkeypatch.setattr("fednano.unlearning.jobs.loku.LokuRunner", lambda data, **options: runner)
    terminal(*SUBMIT)
    assert "utility fell" in terminal("run", code=EXIT_STATE)


def test_a_changed_receipt_or_log_ends_with_its_own_code(terminal: Terminal) -> None:
    terminal(*SUBMIT)
    terminal("run")
    root = terminal.world.place.root
    receipt, log = root / "receipts/u0001.json", root / "log.jsonl"
    key = str(root / "server.pub")
    whole = receipt.read_bytes()
    receipt.write_bytes(whole.replace(b'"loss":2.5', b'"loss":9.5'))
    assert "does not fit" in terminal("verify-receipt", str(receipt), "--key", key, code=EXIT_INVALID)
    assert "BAD" in terminal("verify", "u0001", code=EXIT_INVALID)
    receipt.write_bytes(whole)
    other = str(Path("keys/ann.pub"))
    assert "the key given" in terminal("verify-receipt", str(receipt), "--key", other, code=EXIT_INVALID)
    log.write_bytes(log.read_bytes().replace(b"u0001", b"u0002", 1))
    terminal("verify-receipt", str(receipt), "--key", key)
    assert "signature" in terminal(
        "verify-receipt", str(receipt), "--key", key, "--log", str(log), code=EXIT_INVALID
    )


def test_a_site_that_took_no_part_is_named_with_those_that_did(terminal: Terminal) -> None:
    CliRunner().invoke(app, ["unlearn", "keygen", "--site", "client-009"], catch_exceptions=False)
    said = terminal("submit", "--site", "client-009", "--client", "--reason", "x", code=EXIT_MISTAKE)
    assert "took no part" in said
    assert all(site in said for site in SITES)


def test_a_job_past_its_deadline_raises_an_alarm(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(*SUBMIT, "--deadline", "2090-01-01")
    assert "OVERDUE" not in terminal("list")
    monkeypatch.setattr("fednano.unlearning.jobs.job.now", lambda: datetime(2090, 1, 2, tzinfo=UTC))
    for words in (("list",), ("show", "u0001"), ("watch", "u0001", "--timeout", "0.01")):
        assert "OVERDUE" in terminal(*words, code=EXIT_STATE if words[0] == "watch" else 0)
    assert terminal.json("show", "u0001")["overdue"]
