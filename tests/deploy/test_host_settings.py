"""The [host] table of a federation reaches the language host's command line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fednano.deploy.plan import Plan
from fednano.deploy.server import _host
from fednano.host.options import parser


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
