"""A host's log: plain lines for people, or one object of JSON a line for programs.

What a request was is said in fields: its name, its client, samples, tokens, milliseconds, and the reason of a refusal.
Nothing of what it held is: no numbers, labels or tokens, and not the text of a refusal, which may quote a label.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

__all__ = ["FORMATS", "configure", "event"]

FORMATS = ("text", "json")
_FIELDS = "fednano_fields"


def event(log: logging.Logger, what: str, **fields: object) -> None:
    """Log that something happened.

    Args:
        log: where, at level INFO.
        what: such as ``"request done"``.
        fields: what is known of it.
    """
    if log.isEnabledFor(logging.INFO):
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
        log.info("%s %s", what, text, extra={_FIELDS: {"event": what, **fields}})


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
        level: lines below it are left out.
    """
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    if kind == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_Json())
