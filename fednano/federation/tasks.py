"""From a message's content to its reply: which task, in whose name, and what becomes of an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fednano.errors import ConfigError, FednanoError
from fednano.federation.client_task import Worker, evaluate, gather, hello, install, secure, site_name, train
from fednano.federation.messages import Instruction, Reply
from fednano.security.place import SiteBundle

__all__ = ["TASKS", "carry_out"]

TASKS: dict[str, Callable[[Instruction, Mapping[str, Any]], Reply]] = {
    "hello": hello,
    "gather": gather,
    "install": install,
    "secure": secure,
    "train": train,
    "evaluate": evaluate,
}
"""What a server may ask of a client."""


def carry_out(task: str, content: RecordDict, node: Mapping[str, Any], began: float = 0.0) -> RecordDict:
    """Perform a task; an error a user can understand becomes the reply instead of a crash of the client's process.

    Args:
        task: one of `TASKS`.
        content: of the message.
        node: Flower's node configuration.
        began: when Flower's process for the message began, seconds since 1970; 0 = not known.
    """
    instruction = Instruction.from_records(content)
    try:
        Worker.forgotten, Worker.began = instruction.tombstones, began
        bundle = str(node.get("bundle", ""))
        Worker.credentials = SiteBundle(Path(bundle)).credentials if bundle else None
        reply = TASKS[task](instruction, node)
        reply = replace(reply, facts={**reply.facts, "tombstones": instruction.tombstones.digest})
    except FednanoError as error:
        try:
            name = site_name(node)
        except ConfigError:
            name = "unnamed"
        reply = Reply.failed(name, instruction.round, error)
    return reply.to_records()
