"""What `fednano doctor` finds is true of the run that follows, and what it warns of would fail."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.cli.failure import EXIT_UNFIT
from fednano.federation.checkup import Check, check_all, check_data, check_machine, check_model, port_free
from fednano.federation.config import RunConfig
from fednano.federation.model import build_edge


def named(found: list[Check]) -> dict[str, Check]:
    return {f"{check.topic} {check.name}": check for check in found}


def test_sizes_and_bytes_are_those_of_the_model(settings: dict[str, Any]) -> None:
    config = RunConfig(**settings | {"placement": "split", "adapter": "lora-xs"})
    found = named(check_all(config))
    assert {check.status for check in found.values()} <= {"ok", "note"}
    edge = build_edge(config)
    sizes = found["model split"].facts
    assert sizes["edge"] == sum(p.numel() for p in edge.edge.parameters())
    assert found["model adapter"].facts["trained"] == edge.parameter_count()
    assert found["wire adapters"].facts["each_way"] == sum(t.nbytes for t in edge.travelling().values())
    pixels = edge.edge.preprocess([__import__("PIL.Image").Image.new("RGB", (64, 64))])
    assert sizes["image_tokens"] == len(edge.edge.encode(pixels)[0])
    assert found["data train"].facts["samples"] == 160
    tokens = found["wire activations"].facts["tokens"]
    assert found["wire activations"].facts["up"] == pytest.approx(tokens * edge.edge.hidden_size * 4)


def test_the_length_of_a_sample_is_what_a_step_sends(settings: dict[str, Any]) -> None:
    config = RunConfig(**settings)
    _, sizes = check_model(config)
    _, lengths = check_data(config, sizes)
    from fednano.data import load_dataset
    from fednano.training.data import ClientData
    from fednano.training.features import FeatureCache

    edge = build_edge(config)
    data = load_dataset(config.dataset)
    chosen = [place * len(data) // 64 for place in range(64)]
    batch = edge(*ClientData(data, edge, FeatureCache(edge.edge)).batch(chosen))
    assert lengths == batch.mask.sum(dim=1).tolist()


@pytest.mark.parametrize(
    ("changes", "where", "says"),
    [
        ({"model": "no/such model"}, "model split", "no model 'no/such model'"),
        ({"dataset": "./nowhere"}, "data train", "nor a folder or file that exists"),
        ({"clients": 500}, "data partition", "more clients"),
        ({"device": "cuda"}, "machine gpu", "Set it to 'cpu'"),
        ({"partition": "column", "partition_by": "ward"}, "data train", "ward is missing"),
    ],
)
def test_what_would_fail_is_a_problem(
    changes: dict[str, Any], where: str, says: str, settings: dict[str, Any]
) -> None:
    found = named(check_all(RunConfig(**settings | changes)))
    assert found[where].status == "problem"
    assert says in found[where].text


def test_instructions_are_not_divided_by_their_answers(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {n}", "output": f"zyx {n}"} for n in range(20)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(dataset=str(file))
    _, sizes = check_model(config)
    found = named(check_data(config, sizes)[0])
    assert found["data partition"].status == "problem"
    assert found["data metric"].facts == {"metric": "rouge-l"}
    assert "does not know" in found["data words"].text


def test_a_taken_port_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_free(port)
        monkeypatch.setattr("fednano.federation.checkup.PORTS", {port: "SuperLink"})
        found = named(check_machine(RunConfig(runs_dir=str(tmp_path))))
        assert found["machine ports"].facts == {"taken": [port]}
        assert f"{port} is taken (SuperLink)" in found["machine ports"].text


def test_the_command_ends_with_its_own_code(small_vqa: Path, tmp_path: Path) -> None:
    invoke: Callable[..., Any] = CliRunner().invoke
    options = ["doctor", "--runs-dir", str(tmp_path), "--data", str(small_vqa), "--clients", "3"]
    good = invoke(app, [*options, "--json"])
    assert good.exit_code == 0
    assert {check["topic"] for check in json.loads(good.output)} == {"machine", "model", "data", "wire"}
    bad = invoke(app, [*options, "--clients", "300"])
    assert bad.exit_code == EXIT_UNFIT
    assert "problem data, partition: There are more clients (300)" in bad.output
