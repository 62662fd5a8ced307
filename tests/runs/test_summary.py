"""The summary refuses to be incomplete."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fednano.errors import RunError
from fednano.runs import Phase, RunFolder, Summary
from fednano.runs.summary import REQUIRED, installed_versions

Fields = Callable[[], dict[str, Any]]


def test_round_trip(summary_fields: Fields, tmp_path: Path) -> None:
    phases = {"zero_shot": Phase(0.5), "federated": Phase(0.75, 10, 3.5, 0.2, "note")}
    summary = Summary(**summary_fields(), phases=phases, test_samples=9673, extra={"x": [1, "y"]})
    run = RunFolder.create(tmp_path, "x")
    run.write_summary(summary)
    assert Summary.from_json(run.read_json("summary.json")) == summary


def test_the_fields_that_the_file_must_have(summary_fields: Fields) -> None:
    content = json.loads(json.dumps(Summary(**summary_fields()).to_json()))
    assert set(content["accuracy"]) >= {"zero_shot", "federated"}
    assert set(content["bytes"]) >= set(REQUIRED["bytes"])
    assert set(content["parameters"]) >= {"model", "edge", "trainable"}
    assert {"rounds", "clients", "seed", "wall_seconds", "versions", "rule", "adapter", "phases"} <= set(
        content
    )


@pytest.mark.parametrize(("mapping", "key"), [(name, key) for name, keys in REQUIRED.items() for key in keys])
def test_missing_entries(mapping: str, key: str, summary_fields: Fields) -> None:
    fields = summary_fields()
    del fields[mapping][key]
    with pytest.raises(RunError, match=rf"{mapping}\.{key} is missing"):
        Summary(**fields)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("accuracy.federated", math.nan),
        ("accuracy.federated", 1.01),
        ("accuracy.federated", -0.1),
        ("accuracy.federated", None),
        ("accuracy.local_only", math.inf),
        ("accuracy.zero_shot", "0.5"),
        ("accuracy.zero_shot", True),
        ("bytes.adapter_up_per_client_round", -1),
        ("bytes.activation_up_per_sample_step", math.nan),
        ("bytes.activation_down_per_sample_step", None),
        ("parameters.model", 1.5),
        ("parameters.trainable", -1),
        ("versions.python", ""),
        ("rounds", -1),
        ("rounds", 1.0),
        ("clients", 0),
        ("seed", None),
        ("wall_seconds", math.nan),
        ("wall_seconds", math.inf),
        ("rule", ""),
        ("adapter", None),
        ("status", "done"),
        ("test_samples", 0),
        ("accuracy", None),
        ("phases.federated", Phase(math.nan)),
        ("phases.federated", Phase(0.5, -1)),
        ("phases.federated", Phase(0.5, 1, math.nan)),
    ],
)
def test_wrong_values_are_named(place: str, value: object, summary_fields: Fields) -> None:
    fields = summary_fields() | {"phases": {}}
    name, _, key = place.partition(".")
    if key:
        fields[name][key] = value
    else:
        fields[name] = value
    with pytest.raises(RunError, match=place.replace(".", r"\.")):
        Summary(**fields)


def test_all_problems_are_told_at_once(summary_fields: Fields) -> None:
    fields = summary_fields() | {"clients": 0, "rule": ""}
    with pytest.raises(RunError, match=r"clients must.*rule must"):
        Summary(**fields)


def test_reading_refuses_what_is_not_a_summary(summary_fields: Fields) -> None:
    good = Summary(**summary_fields()).to_json()
    for change, message in (
        ({"surprise": 1}, r"unknown fields \['surprise'\]"),
        ({"phases": {"x": {"accuracy": 0.5, "huh": 1}}}, "not complete"),
        ({"phases": 3}, "not complete"),
    ):
        with pytest.raises(RunError, match=message):
            Summary.from_json(copy.deepcopy(good) | change)
    for key in ("rounds", "rule", "accuracy"):
        with pytest.raises(RunError, match="not complete"):
            Summary.from_json({k: v for k, v in good.items() if k != key})
    with pytest.raises(RunError, match="must hold an object, got list"):
        Summary.from_json([])


def test_versions_are_those_installed() -> None:
    import torch

    found = installed_versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert all(found.values())
