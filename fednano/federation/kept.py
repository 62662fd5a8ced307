"""The answer that a site's worker keeps: a request to train that comes again is answered without training again.

A SuperNode that was killed while it waited for its worker, or before it had sent the answer on, is asked again when it
is back. Its worker may have done the work by then. The same answer costs no second training, no second share of a
privacy budget, and no place in a secure aggregation, in which a client answers once. What a worker does not know any
more is done again from the state before the round (`client_state`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flwr.app import ConfigRecord, RecordDict

__all__ = ["identity", "keeping"]

Perform: TypeAlias = Callable[[str, RecordDict, dict[str, Any], float], RecordDict]

_TOKEN = "host-token"  # each request has a fresh one; it says nothing of what is asked


def identity(content: RecordDict, node: Mapping[str, Any]) -> bytes:
    """What is asked of whom: a hash over everything in a request but its token."""
    parts = dict(content)
    task = parts.get("task")
    if isinstance(task, ConfigRecord):
        parts["task"] = ConfigRecord({name: value for name, value in task.items() if name != _TOKEN})
    named = {name: record.object_id for name, record in parts.items()}
    return hashlib.sha256(json.dumps([named, dict(node)], sort_keys=True).encode()).digest()


def keeping(perform: Perform) -> Perform:
    """As ``perform``, which does a task; but when the last request to train comes again, its answer is given again.

    An error is not kept: the next attempt may succeed.
    """
    kept: dict[bytes, RecordDict] = {}

    def answer(task: str, content: RecordDict, node: dict[str, Any], began: float) -> RecordDict:
        if task != "train":
            return perform(task, content, node, began)
        asked = identity(content, node)
        if asked not in kept:
            kept.clear()  # one is enough, and two may not fit into memory
            reply = perform(task, content, node, began)
            if "error" in reply.config_records.get("head", {}):
                return reply
            kept[asked] = reply
        return kept[asked]

    return answer
