"""The recorded first session says what the commands say today."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "record.py"
spec = importlib.util.spec_from_file_location("record", SCRIPT)
assert spec is not None
assert spec.loader is not None
record = importlib.util.module_from_spec(spec)
sys.modules["record"] = record
spec.loader.exec_module(record)


def test_a_page_is_read_as_it_was_written() -> None:
    steps = [record.Step("fednano x", "one\ntwo 3.5 s", 0, 2.0), record.Step("fednano y", "", 2, 11.0)]
    assert record.steps_of(record.page(steps)) == steps


def test_numbers_may_differ_and_words_may_not() -> None:
    assert record.said("accuracy  90.1 %\nb in 3 s") == record.said("b in 1.2 ms\naccuracy 64.0 %")
    assert record.said("accuracy 90 %") != record.said("loss 90 %")


def test_the_page_records_the_commands_of_the_script() -> None:
    steps = record.steps_of(record.PAGE.read_text())
    assert tuple(step.command for step in steps) == record.COMMANDS
    codes = [step.code for step in steps]
    assert set(codes) == {0, 2}, "one mistake is shown"


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_the_session_goes_as_recorded(tmp_path: Path) -> None:
    for recorded in record.steps_of(record.PAGE.read_text()):
        step = record.carry_out(recorded.command, tmp_path)
        assert step.code == recorded.code, step.output
        assert record.said(step.output) == record.said(recorded.output), step.command
