from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.errors import ConfigError
from fednano.federation.config import OTHER_WORK, UNPROTECTED, RunConfig
from fednano.federation.model import settled

ROOT = Path(__file__).parents[2]


def test_flower_app_lists_every_setting_with_its_default() -> None:
    """`flwr run --run-config` can only override what the app lists."""
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["config"] == RunConfig().to_mapping() | {OTHER_WORK: "", UNPROTECTED: False}


@settings(deadline=None)
@given(
    rounds=st.integers(1, 500),
    alpha=st.floats(1e-3, 1e3),
    rule=st.sampled_from(["fedavg", "fisher"]),
    seed=st.integers(0, 2**31),
)
def test_mapping_round_trip(rounds: int, alpha: float, rule: str, seed: int) -> None:
    config = RunConfig(rounds=rounds, alpha=alpha, rule=rule, seed=seed)
    assert RunConfig.from_mapping(config.to_mapping()) == config


def test_whole_numbers_are_fine_floats() -> None:
    assert RunConfig.from_mapping({"alpha": 1}).alpha == 1.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("clients", 0, "clients is 0; expected at least 1"),
        ("alpha", 0.0, "alpha is 0.0; expected a positive number"),
        ("alpha", -1.0, "alpha is -1.0; expected a positive number"),
        ("alpha", float("nan"), "alpha is nan; expected a finite number"),
        ("rounds", 0, "rounds is 0; expected at least 1"),
        ("rounds", 1.5, "rounds is 1.5 .float.; expected int"),
        ("baselines", 1, "baselines is 1 .int.; expected bool"),
        ("fraction", 1.5, "fraction is 1.5; expected a number above 0 and at most 1"),
        ("holdout", 1.0, "holdout is 1.0; expected a number from 0 to below 1"),
        ("streams", "audio", "streams is 'audio'; expected"),
        ("streams", "", "streams is ''; expected"),
        ("streams", "text,text", "streams is 'text,text'; expected"),
        ("optimizer", "lion", "optimizer is 'lion'; expected one of adam, adamw, sgd"),
        ("wire-dtype", "int4", "wire-dtype is 'int4'; expected one of"),
        ("learning-rte", 0.1, "unknown setting 'learning-rte'. Did you mean 'learning-rate'"),
        ("xyzzy", 1, "unknown setting 'xyzzy'. Known settings: .*alpha"),
    ],
)
def test_bad_values_are_named(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping({key: value})


def test_the_factored_exchange_names_the_wire_types_it_has() -> None:
    with pytest.raises(ConfigError, match="bfloat16 or int8"):
        RunConfig(exchange="factored", wire_dtype="float16")
    assert RunConfig(exchange="factored", wire_dtype="int8").exchange == "factored"


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({}, "fedavg"),
        ({"adapter": "lora-xs"}, "fedavg"),
        ({"client_ranks": "4,8,16"}, "flexlora"),
        ({"client_ranks": "4,8,16", "adapter": "lora"}, "flexlora"),
        ({"rule": "fisher"}, "fisher"),
    ],
)
def test_the_adapter_asks_for_its_rule(settings: dict[str, Any], rule: str) -> None:
    config = settled(RunConfig(**settings))
    assert config == RunConfig(**settings).changed(rule=rule)
    assert settled(config) == config


def test_options_need_a_rule_that_they_are_for() -> None:
    with pytest.raises(ConfigError, match=r"rule-options is 'floor=0.1', and rule is 'auto'"):
        settled(RunConfig(rule_options="floor=0.1"))
