"""The adapter table's choices: rates by the sweep alone, gates by the mean over seeds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from adapters import ADAPTERS, best_rates, gates

from fednano.adapters import names


def row(adapter: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    base = {"seed": 0, "learning_rate": 1e-3, "sweep": False, "zero_shot": 0.6, "uplink_bytes": 27_000.0}
    return {"adapter": adapter, "accuracy": accuracy} | base | changes


def test_the_rate_comes_from_the_sweep_and_equals_go_to_the_smaller() -> None:
    rows = [
        row("lora", 0.9, sweep=True, learning_rate=1e-2),
        row("lora", 0.9, sweep=True, learning_rate=1e-3),
        row("lora", 0.99, learning_rate=1.0),
    ]
    assert best_rates(rows) == {"lora": 1e-3}


def test_gates_are_means_over_the_seeds() -> None:
    rows = [row("lora", 0.9), row("lora", 0.8, seed=1), row("lora-sb", 0.84, uplink_bytes=1_000.0)]
    found = {gate.name: gate for gate in gates(rows)}
    assert found["lora: gain over zero-shot"].value == pytest.approx(0.25)
    assert found["lora-sb: accuracy below lora r16"].value == pytest.approx(0.01)
    assert found["lora-sb: bytes over lora r16"].met
    worse = [*rows[:2], row("lora-sb", 0.64, uplink_bytes=1_001.0)]
    assert not any(gate.met for gate in gates(worse) if gate.name.startswith("lora-sb"))


def test_every_adapter_that_a_run_can_carry_is_in_the_table() -> None:
    assert set(names()) - set(ADAPTERS) == {"dense"}  # the probe
