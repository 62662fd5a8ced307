"""Prometheus: the run's newest numbers over HTTP, from the process of the ServerApp, while the run goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from fednano.errors import ConfigError
from fednano.runs import RunInfo
from fednano.tracking.protocol import Tracker

__all__ = ["ADDRESS", "make"]

ADDRESS = "127.0.0.1:9465"
_GAUGES = {
    "round": "newest round of a phase",
    "score": "score on the test set, 0 to 1",
    "test_loss": "loss on the test set",
    "train_loss": "mean training loss over clients",
    "seconds": "seconds of the newest round",
}
_CLIENT_GAUGES = {
    "loss": "a client's training loss",
    "accuracy": "a client's score on samples that it holds out, 0 to 1",
    "samples": "samples that a client trained on in its newest round",
    "seconds": "seconds of a client's newest round",
}


class _Numbers(Collector):
    """The newest of each number, and the sums of what is counted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.about: dict[str, str] = {}
        self.newest: dict[tuple[str, str], float] = {}
        self.clients: dict[tuple[str, str, str], float] = {}
        self.sums: dict[tuple[str, str], float] = {}

    def take(self, values: Mapping[str, float], step: int) -> None:
        with self.lock:
            for name, value in values.items():
                phase, _, what = name.partition("/")
                self.newest[phase, "round"] = step
                parts = what.split("/")
                if parts[0] == "clients":
                    self.clients[phase, "/".join(parts[1:-1]), parts[-1]] = value
                elif what == "refused" or parts[0] == "bytes":
                    self.sums[phase, what] = self.sums.get((phase, what), 0.0) + value
                else:
                    self.newest[phase, what] = value

    def collect(self) -> Iterator[Any]:
        """All numbers as they are now."""
        with self.lock:
            yield InfoMetricFamily("fednano_run", "the run that goes on", value=self.about)
            for what, text in _GAUGES.items():
                gauge = GaugeMetricFamily(f"fednano_run_{what}", text, labels=["phase"])
                for (phase, name), value in self.newest.items():
                    if name == what:
                        gauge.add_metric([phase], value)
                yield gauge
            for what, text in _CLIENT_GAUGES.items():
                gauge = GaugeMetricFamily(f"fednano_run_client_{what}", text, labels=["phase", "client"])
                for (phase, client, name), value in self.clients.items():
                    if name == what:
                        gauge.add_metric([phase, client], value)
                yield gauge
            sent = CounterMetricFamily(
                "fednano_run_bytes", "bytes by plane, all clients", labels=["phase", "plane"]
            )
            refused = CounterMetricFamily(
                "fednano_run_refused", "updates that were not merged", labels=["phase"]
            )
            for (phase, name), value in self.sums.items():
                if name == "refused":
                    refused.add_metric([phase], value)
                else:
                    sent.add_metric([phase, name.partition("/")[2]], value)
            yield sent
            yield refused


class _Prometheus:
    def __init__(self, address: str) -> None:
        host, colon, port = address.rpartition(":")
        if not (colon and host and port.isdigit() and int(port) < 65_536):
            raise ConfigError(
                f"track has prometheus={address}; expected HOST:PORT, such as prometheus={ADDRESS}."
            )
        self._host, self._port = host, int(port)
        self._numbers = _Numbers()
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self.address = ""

    def start(self, info: RunInfo, settings: Mapping[str, bool | int | float | str]) -> None:
        told = {"run": info.run_id, "model": info.model, "dataset": info.dataset}
        self._numbers.about = told | {"adapter": info.adapter, "rule": info.rule}
        registry = CollectorRegistry()
        registry.register(self._numbers)
        try:
            self._server, self._thread = start_http_server(self._port, addr=self._host, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"track: prometheus cannot listen at {self._host}:{self._port}: {error.strerror or error}. Choose "
                "another address: --track prometheus=127.0.0.1:9466"
            ) from error
        self.address = f"{self._host}:{self._server.server_address[1]}"

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._numbers.take(values, step)

    def finish(self, status: str) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None


def make(address: str = ADDRESS) -> Tracker:
    """A tracker that serves ``http://ADDRESS/metrics`` until the run ends. Raises ConfigError."""
    return _Prometheus(address)
