"""The [host] table of a federation reaches the language host's command line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fednano.deploy.plan import Plan
from fednano.deploy.server import _host
from fednano.errors import ConfigError
from fednano.host.options import parser
from fednano.host_settings import HostSettings


def options(**host: Any) -> Any:
    plan = Plan.from_mapping(
        {"name": "f", "sites": ["a"], "server": {"names": ["here"]}, "host": host}, "federation.toml"
    )
    words = _host(SimpleNamespace(root=Path("server")), plan, 9464)  # type: ignore[arg-type]
    return parser().parse_args(words[words.index("fednano.host") + 1 :])


def test_settings_of_the_host_are_its_options() -> None:
    plain = options(device="cuda")
    assert (plain.device, plain.device_map, plain.weights, plain.log_format) == ("cuda", "", "", "text")
    found = options(**{"device-map": "balanced", "weights": "int4", "log-format": "json"})
    assert (found.device_map, found.weights, found.log_format) == ("balanced", "int4", "json")
    assert found.listen == "0.0.0.0:9444"


def test_what_is_not_set_is_left_to_the_host() -> None:
    """On a GPU it lets steps share passes by itself, which a number written here would switch off."""
    assert options().batch_tokens is None
    assert options(**{"batch-tokens": 0}).batch_tokens == 0
    fast = options(
        device="cuda", **{"compile": True, "cuda-graphs": True, "memory-gb": 40, "keep-gpu-bytes": 2**30}
    )
    assert (fast.compile, fast.cuda_graphs, fast.memory_gb, fast.keep_gpu_bytes) == (True, True, 40.0, 2**30)
    assert not options().compile


@pytest.mark.parametrize("name", [spec.name for spec in fields(HostSettings)])
def test_every_setting_is_an_option_of_the_host(name: str) -> None:
    assert name in vars(parser().parse_args(["--model", "tiny"]))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"compile": 1}, "compile is 1; expected bool"),
        ({"cuda-graphs": "yes"}, "cuda-graphs is 'yes'; expected bool"),
        ({"batch-tokens": True}, "batch-tokens is True; expected int"),
        ({"memory-gb": "40"}, "memory-gb is '40'; expected float"),
        ({"cuda-graph": True}, "unknown key host.cuda-graph.*cuda-graphs"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_told(setting: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        options(**setting)
