"""What Prometheus reads: the counters of the host, while it works."""

from __future__ import annotations

import urllib.request

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from fednano.errors import ConfigError
from fednano.host import RemoteLLM, serve
from fednano.host.metrics import serve_metrics
from fednano.models.language import LocalLLM


def scrape(address: str) -> dict[str, float]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name + "".join(f"[{value}]" for value in sample.labels.values())] = sample.value
    return found


def test_counters_are_those_of_the_host(local: LocalLLM) -> None:
    with serve(local, grace=1.0) as host, serve_metrics("127.0.0.1:0", host.stats) as address:
        with RemoteLLM(host.address, insecure=True) as remote:
            x, mask = torch.randn(2, 4, local.hidden_size), torch.ones(2, 4, dtype=torch.bool)
            remote.loss(x, mask, torch.zeros(2, 4, dtype=torch.int64))
        found = scrape(address)
        assert found["fednano_host_step_requests_total"] == 1
        assert found["fednano_host_kept_samples"] == 0
        assert found["fednano_host_computed_milliseconds_total"] >= 0
        assert {name.removesuffix("_total") for name in found} >= {
            f"fednano_host_{name}" for name in host.stats() if not name.startswith("refused_")
        }


def test_a_port_that_is_taken_and_a_bad_address_are_named() -> None:
    with (
        serve_metrics("127.0.0.1:0", dict) as address,
        pytest.raises(ConfigError, match="another port"),
        serve_metrics(address, dict),
    ):
        pass
    with pytest.raises(ConfigError, match="HOST:PORT"), serve_metrics("9464", dict):
        pass


def test_refusals_are_counted_by_reason() -> None:
    with serve_metrics("127.0.0.1:0", lambda: {"refused_busy": 3, "refused_auth": 1}) as address:
        found = scrape(address)
    assert found["fednano_host_refused_total[busy]"] == 3
    assert found["fednano_host_refused_total[auth]"] == 1
