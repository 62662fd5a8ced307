"""Run server and clients on one machine: through Flower's simulation engine, or in this process alone."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fednano.errors import ConfigError, FednanoError
from fednano.federation.apps import client_app, make_server_app
from fednano.federation.baselines import build_rule
from fednano.federation.config import RunConfig, check_backend
from fednano.federation.exchange import Stop
from fednano.federation.model import build_adapter, settled
from fednano.federation.server import config_of
from fednano.runs import RunFolder, RunView

__all__ = ["simulate"]


def simulate(
    config: RunConfig, *, backend: str = "ray", view: RunView | None = None, verbose: bool = False
) -> Path:
    """Run a whole federation on this machine.

    Args:
        config: the run's settings; ``config.clients`` clients are simulated.
        backend: a name in :data:`fednano.federation.config.BACKENDS`. Both give the same bits.
        view: what the user sees; by default chosen from the terminal.
        verbose: show Flower's own log.

    Returns:
        The run folder.

    Raises:
        FednanoError: the run cannot start or go on.
        Interrupted: Ctrl-C; the run folder keeps what was done.
    """
    check_backend(backend)
    if config.server_dir:
        raise ConfigError(
            f"server-dir is {config.server_dir!r}: simulated clients are not enrolled there. Leave it out, or start "
            "the run with: fednano run"
        )
    if config.resume:  # as many clients as the run had, on machines like its own
        before = config_of(RunFolder.open(config.resume, root=config.runs_dir))
        config = config.changed(clients=before.clients, device=before.device, threads=before.threads)
    else:  # a misspelt name is told before Ray starts
        named = settled(config)
        build_rule(named, named.rule)
        build_adapter(named)
    stop = Stop()
    with _ctrl_c(stop), _flower_log(verbose):
        if backend == "inprocess":
            return _in_process(config, view, stop)
        return _flower(config, view, stop)


def _in_process(config: RunConfig, view: RunView | None, stop: Stop) -> Path:
    from fednano.federation.inprocess import InProcessGrid
    from fednano.federation.server import run_server
    from fednano.federation.worker import Worker

    grid = InProcessGrid(client_app, config.clients)
    try:
        return run_server(grid, config, view=view, stop=stop)
    finally:
        grid.close()
        Worker.close_current()


def _flower(config: RunConfig, view: RunView | None, stop: Stop) -> Path:
    # Neither framework may report home from an institution's machine unless its owner asks for it.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from flwr.simulation import run_simulation

    paths: list[Path] = []
    run_simulation(
        server_app=make_server_app(config, view=view, stop=stop, done=paths.append),
        client_app=client_app,
        num_supernodes=config.clients,
        backend_config={
            "client_resources": {
                "num_cpus": config.threads,
                "num_gpus": 0.25 if config.device == "cuda" else 0.0,
            },
            "init_args": {"logging_level": "error", "log_to_driver": False, "configure_logging": True},
        },
    )
    if not paths:
        raise FednanoError("Flower's simulation ended without running the server. Run again with --verbose.")
    return paths[0]


@contextmanager
def _ctrl_c(stop: Stop) -> Iterator[None]:
    """Let Ctrl-C end the run through its own exit, once; a second one ends the process at once.

    Flower's engine waits for its workers before it looks at an interrupt, so an exception in the main thread would
    hang there for ever. The request goes to the round loop instead, which ends, and then everything does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if stop.requested:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        stop.set("interrupted by Ctrl-C." if number == signal.SIGINT else "asked to end by SIGTERM.")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


@contextmanager
def _flower_log(verbose: bool) -> Iterator[None]:
    """Flower's log repeats what our own view shows better; keep it to errors unless asked."""
    logger = logging.getLogger("flwr")
    level = logger.level
    if not verbose:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
