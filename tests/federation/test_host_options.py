"""The host that a run starts: what the run's settings tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fednano.errors import ConfigError
from fednano.federation.config import RunConfig
from fednano.federation.hosting import open_host
from fednano.federation.model import connect
from fednano.host import RemoteLLM
from fednano.runs import make_view


def test_a_runs_host_gets_its_options(tmp_path: Path) -> None:
    config = RunConfig(host_options='dtype="bfloat16" max-batch=3', host_workers=1)
    with (
        open_host(config, make_view("quiet"), tmp_path / "host.log", "run") as ticket,
        connect(config, ticket) as llm,
    ):
        assert isinstance(llm, RemoteLLM)
        info = llm.describe()
    assert (info.dtype, info.limits.max_batch) == ("bfloat16", 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"host_options": "cuda-graph=true"}, "host-options has the unknown key cuda-graph.*cuda-graphs"),
        ({"host_options": 'workers="two"'}, "host-options: workers is 'two'; expected int"),
        ({"host_options": 'model="tiny"'}, "host-options has a model"),
        ({"host_options": "compile=true", "placement": "local"}, "placement says that it starts none"),
        ({"host_options": "compile=true", "host_address": "a:1"}, "host-address or server-dir says"),
        ({"host_options": "compile"}, "host-options has 'compile'; expected settings such as"),
    ],
)
def test_bad_host_options_are_told_at_the_start(settings: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        RunConfig(**settings)  # type: ignore[arg-type]
