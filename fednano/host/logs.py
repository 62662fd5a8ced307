"""A host's log: plain lines for people, or one object of JSON a line for programs.

What a request was is said in fields: its name, its client, samples, tokens, milliseconds, and the reason of a refusal.
Nothing of what it held is: no numbers, labels or tokens, and not the text of a refusal, which may quote a label.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

__all__ = ["FORMATS", "configure", "event"]

FORMATS = ("text", "json")
_FIELDS = "fednano_fields"
_requests = logging.getLogger("fednano.host.requests")


def event(what: str, fields: Mapping[str, object], *, usual: bool = True) -> None:
    """Log that something happened to requests.

    Args:
        what: such as ``"request done"``.
        fields: what is known of it.
        usual: whether it is nothing to look into. Of a busy host such lines are many: they are left out of a log for
            people above level DEBUG.
    """
    level = logging.DEBUG if usual else logging.INFO
    if _requests.isEnabledFor(level):
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
        _requests.log(level, "%s %s", what, text, extra={_FIELDS: {"event": what, **fields}})


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        fields = getattr(record, _FIELDS, None)
        said |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said)


def configure(kind: str, level: str) -> None:
    """Write this process's log to stderr.

    Args:
        kind: one of `FORMATS`.
        level: lines below it are left out; at INFO, JSON has a line for each request and each pass.
    """
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    if kind == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_Json())
    every = kind == "json" and logging.getLogger().isEnabledFor(logging.INFO)
    _requests.setLevel(logging.DEBUG if every else logging.NOTSET)
