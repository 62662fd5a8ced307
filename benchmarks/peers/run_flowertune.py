"""Run the FlowerTune-style app in Flower's simulation; a JSON line tells each round's begin, end, and what it carried.

    python benchmarks/peers/run_flowertune.py '{"model": ..., "data": ..., "rounds": 2, ...}'

Settings are those of the app's ``pyproject.toml``. The app itself is not changed: what is told is seen from outside.
"""

from __future__ import annotations

import json
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

APP = Path(__file__).parent / "flowertune"


def tell(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, "time": time.time(), **more}), flush=True)


def array_bytes(messages: Iterable[Any]) -> int:
    """Bytes of the tensors in messages, as they stand in Flower's records."""
    records = (record for message in messages for record in message.content.array_records.values())
    return sum(len(array.data) for record in records for array in record.values())


class Watched:
    """A grid that tells what passes through it."""

    def __init__(self, grid: Any) -> None:
        self._grid, self._round = grid, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        sent = list(messages)
        if not sent:
            return []
        self._round += 1
        down = array_bytes(sent)
        tell("started", round=self._round)
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        failed = [str(reply.error) for reply in replies if reply.has_error()]
        if failed:
            raise SystemExit(f"a client failed: {failed[0]}")
        tell("done", round=self._round, clients=len(replies), up=array_bytes(replies), down=down)
        return replies


def main() -> None:
    sys.path.insert(0, str(APP))
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    import client_app
    import server_app

    config = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config |= json.loads(sys.argv[1])
    judge = server_app.test

    def judged(*arguments: Any) -> float:
        score: float = judge(*arguments)
        tell("accuracy", value=score)
        return score

    server_app.test = judged
    outer = ServerApp()

    @outer.main()
    def _main(grid: Any, context: Any) -> None:
        context.run_config.update(config)
        server_app.app(Watched(grid), context)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    sites = len(list((Path(config["data"]) / "sites").iterdir()))
    run_simulation(outer, client_app.app, sites, backend_config=resources)


if __name__ == "__main__":
    main()
