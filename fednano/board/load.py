"""A language host's load, read from the endpoint that it offers to Prometheus."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from fednano.errors import ConfigError

__all__ = ["HostLoad"]

_PREFIX = "fednano_host_"
_TIMEOUT_S = 2.0
_LEAST_S = 1.0
_MOST_BYTES = 1 << 20


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class HostLoad:
    """Asks one host, at most once a second however many pages look.

    Args:
        url: such as ``http://127.0.0.1:9464/metrics``.

    Raises:
        ConfigError: not a URL of that kind.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"host-metrics is {url!r}; expected a URL such as http://127.0.0.1:9464/metrics, which the host serves "
                "with: fednano host --metrics 127.0.0.1:9464"
            )
        self._url = url
        self._lock = threading.Lock()
        self._asked = -_LEAST_S
        self._found: dict[str, Any] = {}
        # Without the environment's proxies: the host is near, and its counters are nobody else's business.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def read(self) -> dict[str, Any]:
        """``{"values": name -> value, "refused": reason -> count}``, or ``{"error": text}``."""
        with self._lock:
            if time.monotonic() - self._asked >= _LEAST_S:
                self._found = self._ask()
                self._asked = time.monotonic()
            return self._found

    def _ask(self) -> dict[str, Any]:
        from prometheus_client.parser import text_string_to_metric_families

        try:
            with self._opener.open(self._url, timeout=_TIMEOUT_S) as reply:
                text = reply.read(_MOST_BYTES).decode()
            values: dict[str, float] = {}
            refused: dict[str, float] = {}
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if not sample.name.startswith(_PREFIX) or sample.name.endswith("_created"):
                        continue
                    name = sample.name.removeprefix(_PREFIX).removesuffix("_total")
                    if name == "refused":
                        refused[sample.labels.get("reason", "")] = sample.value
                    elif name == "gpu_memory_bytes":
                        labels = sample.labels
                        values[f"gpu_{labels.get('gpu', '')}_{labels.get('what', '')}_bytes"] = sample.value
                    elif not sample.labels:
                        values[name] = sample.value
        except (OSError, ValueError, urllib.error.URLError) as error:
            return {"error": f"the host's counters cannot be read: {getattr(error, 'reason', None) or error}"}
        if not values:
            return {"error": "that address answers, but not with the counters of a language host"}
        return {"values": values, "refused": refused}
