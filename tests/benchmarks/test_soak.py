"""What the soak reads off a deployment: memory, rounds, and what is not answered for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.soak import Soak as Seen
from benchmarks.soak import growth, judge, rss_mib, unanswered
from fednano.runs import RunFolder


def samples(*values: float) -> list[dict[str, float]]:
    return [{"at_s": float(at), "host_mib": value} for at, value in enumerate(values)]


def test_growth_is_that_of_the_last_third_over_the_beginning_of_the_second() -> None:
    warm_up, flat = [1.0] * 10, [100.0] * 20
    assert growth(samples(*warm_up, *flat), "host_mib", 30.0) == 1.0
    leak = [100.0 + number for number in range(20)]
    assert growth(samples(*warm_up, *leak), "host_mib", 30.0) == pytest.approx(114.5 / 100.5)
    spike = [100.0] * 15 + [900.0] + [100.0] * 4
    assert growth(samples(*warm_up, *spike), "host_mib", 30.0) == 1.0
    assert growth([], "host_mib", 30.0) == 0.0


def test_rounds_and_requests_that_nobody_answers_for_are_counted(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run", {"rounds": 3})
    for number in (1, 2):
        for client in ("a", "b"):
            record = {"phase": "federated", "scope": "client", "client": client, "round": number}
            run.append_metrics(record | ({"refused": "no reply"} if client == "b" else {"loss": 1.0}))
        run.append_metrics({"phase": "federated", "scope": "global", "round": number, "train_loss": 1.0})
    assert unanswered(run.path, 2, 2) == (0, 0)
    assert unanswered(run.path, 2, 3) == (1, 2)
    assert unanswered(run.path, 3, 2) == (0, 2)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system does not tell")
def test_memory_of_processes_that_are_gone_counts_nothing() -> None:
    assert rss_mib([os.getpid()]) > 1.0
    assert rss_mib([2**22 + 1]) == 0.0


def test_a_soak_in_which_nothing_was_done_misses_its_gates(tmp_path: Path) -> None:
    rows, gates = judge(Seen(tmp_path, ["a"]), [], 10, 60.0)
    met = {gate.name: gate.met for gate in gates}
    assert not met["memory_samples"]
    assert not met["final_adapter_is_finite"]
    assert not met["accuracy_over_zero_shot"]
    assert rows[0]["rounds"] == 0
