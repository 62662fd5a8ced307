"""Clients that measure a host: what they do, and how their times become numbers."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fednano.host import HostLimits, RunningHost, serve
from fednano.host.bench import main as bench
from fednano.host.bench import row_of
from fednano.host.drive import Driven, Load, batch_of, main, play
from fednano.models.language import LocalLLM


def test_the_rate_is_that_of_each_client_between_its_first_answer_and_its_last() -> None:
    # One step a second, and one in two seconds.
    driven = Driven([[(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], [(1, 2), (2, 4)]])
    assert driven.rate() == pytest.approx(3 / 2)
    assert driven.latency(0.5) == pytest.approx(1)
    assert driven.latency(0.99) == pytest.approx(2)
    assert Driven().rate() == Driven([[(0, 1)]]).rate() == Driven().latency(0.5) == 0


def test_a_joint_batch_counts_whole() -> None:
    """Eight clients are answered together every second, a little one after the other, whatever is seen of it."""
    for count in (2, 3, 9):
        driven = Driven([[(n + c / 1e3, n + 1 + c / 1e3) for n in range(count)] for c in range(8)])
        assert driven.rate() == pytest.approx(8)


def test_clients_take_steps_and_keep_their_gradients(
    host: RunningHost, local: LocalLLM, tmp_path: Path
) -> None:
    load = Load(host.address, (5, 9, 7), seconds=0.0, steps=3, keep_gradients=str(tmp_path), seed=4)
    driven = play(load, [0, 2])
    assert [len(client) for client in driven.steps] == [3, 3]
    assert not driven.errors
    assert row_of(load, driven)["steps_per_second"] > 0
    assert {path.stem for path in tmp_path.iterdir()} == {"0", "2"}
    for client in (0, 2):
        inputs = batch_of(local.hidden_size, local.vocab_size, load, client)
        _, want = local.loss_and_gradient(*inputs, "cross_entropy", True)
        torch.testing.assert_close(load_file(tmp_path / f"{client}.safetensors")["gradient"], want)


def test_a_busy_or_absent_host_is_counted_and_ends_nothing(local: LocalLLM) -> None:
    with serve(local, limits=HostLimits(max_requests=1)) as host:
        busy = play(Load(host.address, (6,) * 6, seconds=0.3, retry_seconds=0.0), range(6))
    assert busy.unavailable > 0
    assert sum(map(len, busy.steps)) > 0
    assert not busy.errors
    gone = play(Load(host.address, (6, 6), retry_seconds=0.0), [0, 1])
    assert len(gone.errors) == 2
    assert "HostUnavailable" in gone.errors[0] + gone.errors[1]


def test_loads_come_as_lines_and_answers_too(host: RunningHost) -> None:
    load = Load(host.address, (4, 4), seconds=0.0, steps=2)
    lines = io.StringIO()
    main(io.StringIO(json.dumps({"load": asdict(load), "clients": [1]}) + "\n"), lines)
    ready, answer = map(json.loads, lines.getvalue().splitlines())
    assert ready == {}
    assert len(answer["steps"]) == 1
    assert len(answer["steps"][0]) == 2
    assert answer["received"] > 0


def test_wrong_numbers_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["--clients", "0"]) == 2
    assert "numbers above 0" in capsys.readouterr().err
