"""From a message's content to its reply: which task, in whose name, and what becomes of an error."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from flwr.app import RecordDict

from fednano.errors import ConfigError, FednanoError
from fednano.federation.client_task import evaluate, gather, hello, install, secure, train
from fednano.federation.known_again import resurfaced
from fednano.federation.messages import Instruction, Reply
from fednano.federation.worker import Worker, site_name
from fednano.security.authority import require_valid
from fednano.security.place import Credentials, SiteBundle

__all__ = ["ABOVE", "OTHER_WORK_BY", "TASKS", "carry_out", "loaded"]

Task: TypeAlias = Callable[[Instruction, Mapping[str, Any]], Reply]

TASKS: dict[str, Task] = {
    "hello": hello,
    "gather": gather,
    "install": install,
    "secure": secure,
    "train": train,
    "evaluate": evaluate,
    "resurfaced": resurfaced,
}
"""What a server may ask of a client."""

ABOVE = {"unlearn": "fednano.unlearning.live.site:asked"}
"""Further tasks, of packages that stand on this one and are loaded with the first message."""


OTHER_WORK_BY = "fednano.unlearning.live.runner:serve"
"""What the server's app does where its run configuration names a finished run under `OTHER_WORK`."""


def loaded(place: str) -> Callable[..., Any]:
    """A function by its module and name, ``module:function``."""
    module, _, function = place.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def carry_out(task: str, content: RecordDict, node: Mapping[str, Any], began: float = 0.0) -> RecordDict:
    """Perform a task; an error a user can understand becomes the reply instead of a crash of the client's process.

    Args:
        task: one of `TASKS` or `ABOVE`.
        content: of the message.
        node: Flower's node configuration.
        began: when Flower's process for the message began, seconds since 1970; 0 = not known.
    """
    instruction = Instruction.from_records(content)
    try:
        Worker.forgotten, Worker.began = instruction.tombstones, began
        bundle = str(node.get("bundle", ""))
        Worker.credentials = _credentials(bundle) if bundle else None
        Worker.models = Path(str(node["models"])) if node.get("models") else None
        reply = (loaded(ABOVE[task]) if task in ABOVE else TASKS[task])(instruction, node)
        reply = replace(reply, facts={**reply.facts, "tombstones": instruction.tombstones.digest})
    except FednanoError as error:
        try:
            name = site_name(node)
        except ConfigError:
            name = "unnamed"
        reply = Reply.failed(name, instruction.round, error)
    return reply.to_records()


def _credentials(bundle: str) -> Credentials:
    """A site's own. An expired certificate is told here; on the wire it would be a connection that fails."""
    own = SiteBundle(Path(bundle)).credentials
    require_valid(own.certificate, f"fednano deploy renew --bundle {bundle}")
    return own
