"""`fednano client up`: a site's SuperNode and warm worker, with the site's keys and data, kept running."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fednano.deploy.node import flower, flower_environment, free_port, keep_up, owned, say
from fednano.deploy.supervise import Child, command
from fednano.errors import ConfigError
from fednano.security.authority import require_valid
from fednano.security.keys import read_private
from fednano.security.place import SiteBundle

__all__ = ["client_up", "node_config"]

# Each message waits for its executor to look for it; Flower's own interval is a second.
_OFTEN = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"}
# When a run is stopped while a SuperNode of Flower 1.41 receives a message of it, the SuperNode says this and keeps the
# message: it is worked off in the place of the next one, and from then on each answer leaves only when another message
# comes. All of it lies in memory, so a new process is free of it; what was under way is asked again by the server.
_BEHIND = "is not in `RUNNING` status. Ignoring message "


def client_up(bundle: Path) -> None:
    """Run a site's SuperNode and its warm worker until SIGTERM or SIGINT.

    Args:
        bundle: folder of the site's keys, as `fednano deploy enroll` made it.

    Raises:
        ConfigError: the bundle is not whole, a key can be read by others, its certificate is not valid now, or it runs
            already.
    """
    place = SiteBundle(bundle.absolute())
    facts, state = place.facts, place.root / "state"
    # What is wrong with the keys is said now, if anything is.
    require_valid(place.credentials.certificate, f"fednano deploy renew --bundle {bundle}")
    read_private(place.root / "node.key", "fednano deploy enroll")
    with owned(state):
        arguments = [
            flower("flower-supernode"),
            *("--root-certificates", str(place.root / "ca.crt"), "--superlink", facts["fleet"]),
            *("--auth-supernode-private-key", str(place.root / "node.key")),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", node_config(place)),
        ]
        worker = command("fednano.federation.warm", "--socket", str(state / "worker.sock"))
        children = [
            Child("worker", worker, state / "worker.log"),
            Child(
                "supernode",
                arguments,
                state / "supernode.log",
                flower_environment(state / "flwr") | _OFTEN,
                ailing=_BEHIND,
            ),
        ]
        say(f"{facts['site']}: joining {facts['federation']} at {facts['fleet']}")
        keep_up(state, children, lambda _: {"site": facts["site"], "federation": facts["federation"]})


def node_config(place: SiteBundle) -> str:
    """What a SuperNode tells its client, in Flower's form: ``key="text" key=number``.

    Raises:
        ConfigError: a path holds a quote, or the bundle says nothing of data.
    """
    facts = place.facts
    given: dict[str, Any] = facts["node_config"]
    if not {"data", "partition-id"} & set(given):
        raise ConfigError(
            f'{place.root / "site.json"} does not say where the data is: give its node_config "data", a folder.'
        )
    own = (
        place.root / "keys" / f"{facts['site']}.key"
    )  # where `fednano unlearn keygen --keys BUNDLE/keys` puts it
    values = {
        "site": facts["site"],
        "bundle": str(place.root),
        "state": str(place.root / "state" / "memory"),
        "worker": str(place.root / "state" / "worker.sock"),
        **({"key": str(own)} if own.exists() else {}),
        **given,
    }
    if any('"' in str(value) or "'" in str(value) for value in values.values()):
        raise ConfigError(f"a path with quotes cannot be given to a SuperNode: {values}.")
    return " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items())
