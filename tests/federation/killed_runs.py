"""Kill runs with SIGKILL at chosen steps, resume each, and print what they end with, as JSON.

A process of its own: it loads everything once and forks, so that every run starts from a process without threads that
need not import or load anything.

Usage: killed_runs.py DATASET FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fednano.federation import (
    client_state,
    rounds,
)
from fednano.federation.config import RunConfig
from fednano.federation.simulation import simulate
from fednano.models.load import load_edge, load_language
from fednano.runs import RunFolder, checkpoints, make_view, report

RULES = {"fedsa": "sign", "scaffold": "int8"}
STEPS = [
    ("scaffold", "a client remembers", 1),
    ("scaffold", "the merge", 2),
    ("fedsa", "half a checkpoint", 2),
    ("fedsa", "the checkpoint", 1),
    ("fedsa", "the judgement", 1),
]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(step: str, number: int) -> None:
    """Make this process kill itself when it has done a step of a round."""

    def after(module: Any, name: str, due: Callable[..., bool]) -> None:
        real = getattr(module, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            done = real(*args, **kwargs)
            if due(*args):
                die()
            return done

        setattr(module, name, hooked)

    if step == "a client remembers":
        after(client_state.ClientState, "save", lambda state, now, *_: now == number)
    elif step == "the merge":
        after(rounds, "_settle", lambda rule, spec, done, *_: done.state.round == number)
    elif step == "half a checkpoint":
        after(
            checkpoints,
            "write_bytes",
            lambda path, _: path.parent.name.startswith(f".new-round-{number:04d}"),
        )
    elif step == "the checkpoint":
        after(rounds, "save_round", lambda fed, phase, now, _: now == number)
    elif step == "the judgement":
        after(rounds, "judge_round", lambda fed, phase, now, *_: now == number)
    else:
        raise AssertionError(step)


def forked(work: Callable[[], None]) -> int:
    """Run something in a fork; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ending(root: Path) -> dict[str, str]:
    """Hashes of the adapter and of what each client remembers at the end."""
    folder = RunFolder.open("latest", root=root)
    files = {"adapter": folder.path / "adapter.safetensors"}
    for path in sorted((root / "cache" / "clients" / folder.id).rglob("round-0002.safetensors")):
        files[path.parent.name] = path
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def main(dataset: str, root: Path) -> None:
    def settings(rule: str) -> dict[str, Any]:
        return {
            **{"dataset": dataset, "rule": rule, "codec": RULES[rule], "runs_dir": str(root)},
            **{"clients": 2, "alpha": 100.0, "rounds": 2, "samples": 4, "batch_size": 4, "rank": 2},
            **{"final_samples": 2, "evaluate_samples": 2, "evaluate_every": 1, "early_stop": 9},
            **{
                "max_new_tokens": 1,
                "learning_rate": 0.02,
                "placement": "local",
                "cache_dir": str(root / "cache"),
            },
        }

    def run(**values: Any) -> None:
        simulate(RunConfig(**values), backend="inprocess", view=make_view("quiet"))

    report.render_report = lambda path: path / "report.html"  # pictures are drawn and tested elsewhere
    load_edge("tiny")
    load_language("tiny")
    found = []
    whole = {}
    for rule in RULES:
        assert forked(lambda rule=rule: run(**settings(rule))) == 0
        whole[rule] = ending(root)
    for rule, step, number in STEPS:

        def killed(rule: str = rule, step: str = step, number: int = number) -> None:
            arm(step, number)
            run(**settings(rule))

        status = forked(killed)
        resumed = forked(lambda: run(resume="latest", runs_dir=str(root)))
        same = resumed == 0 and ending(root) == whole[rule]
        found.append({"rule": rule, "step": step, "status": status, "resumed": resumed, "same": same})
    print(json.dumps({"whole": whole, "found": found}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
