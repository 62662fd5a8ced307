"""A host's counters for Prometheus, served over HTTP from a thread of their own.

Nothing in them tells what is computed: counts, bytes, and places taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fednano.errors import ConfigError

__all__ = ["serve_metrics"]

_GAUGES = {
    "in_flight",
    "buffered_bytes",
    "waiting",
    "kept_samples",
    "kept_memory_bytes",
    "kept_disk_bytes",
    "kept_gpu_bytes",
    "cuda_graphs",
    "cuda_graph_bytes",
}
_HELP = {
    "step_tokens": "real tokens of training steps that were answered",
    "step_samples": "samples of training steps that were answered",
    "computed": "jobs that a worker ran",
    "computed_milliseconds": "time that workers computed, all together",
    "batches": "passes over the model for training steps",
    "pass_milliseconds": "time that those took the device, all together",
    "batched_requests": "training steps that shared a pass with another",
    "in_flight": "requests admitted and not yet answered",
    "buffered_bytes": "tensor bytes of those requests",
    "cuda_graphs": "sizes of passes that are recorded as CUDA graphs",
    "cuda_graph_bytes": "memory of the GPU that only those use",
    "waiting": "training steps received and not yet computed",
}


class _Counters(Collector):
    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """All counters, as they are now."""
        refused = CounterMetricFamily(
            "fednano_host_refused", "requests refused, by reason", labels=["reason"]
        )
        for name, value in sorted(self._read().items()):
            if name.startswith("refused_"):
                refused.add_metric([name.removeprefix("refused_")], value)
                continue
            text = _HELP.get(name, name.replace("_", " "))
            kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            yield kind(f"fednano_host_{name}", text, value=value)
        yield refused
        if torch.cuda.is_available():
            memory = GaugeMetricFamily(
                "fednano_host_gpu_memory_bytes", "memory of each GPU", labels=["gpu", "what"]
            )
            for index in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(index)
                memory.add_metric([str(index), "free"], free)
                memory.add_metric([str(index), "total"], total)
            yield memory


@contextmanager
def serve_metrics(address: str, read: Callable[[], Mapping[str, int]]) -> Iterator[str]:
    """Serve ``http://ADDRESS/metrics`` for the length of a ``with`` block.

    Args:
        address: ``HOST:PORT``; port 0 takes a free one.
        read: gives the counters, from any thread.

    Yields:
        The bound address.

    Raises:
        ConfigError: not an address, or the port is taken.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit() and int(port) < 65_536):
        raise ConfigError(f"metrics: got {address!r}, expected HOST:PORT, such as 127.0.0.1:9464")
    registry = CollectorRegistry()
    registry.register(_Counters(read))
    try:
        server, thread = start_http_server(int(port), addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"metrics: cannot listen at {address}: {error.strerror or error}. Choose another port, 0 for any free one"
        ) from error
    try:
        yield f"{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
